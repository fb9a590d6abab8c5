"""Published policies and their parts, by the name used on the command line.

To add one, write a class in a new file here and name it in one of these tables.
"""

from simulator.policies.base import HeadAllocator, LayerAllocator, Scorer, Trigger
from simulator.policies.full import Full
from simulator.policies.heads import UniformHeads, UtilityHeads
from simulator.policies.layers import PyramidLayers, UniformLayers, WaveLayers
from simulator.policies.random import Random, RandomPrompt
from simulator.policies.rkv import RKV
from simulator.policies.snapkv import SnapKV
from simulator.policies.streaming_llm import StreamingLLM
from simulator.policies.triggers import BufferFull, EveryN, Never

SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer for scorer in (Full, StreamingLLM, SnapKV, RKV, Random, RandomPrompt)
}
LAYER_ALLOCATORS: dict[str, type[LayerAllocator]] = {
    allocator.name: allocator for allocator in (UniformLayers, PyramidLayers, WaveLayers)
}
HEAD_ALLOCATORS: dict[str, type[HeadAllocator]] = {
    allocator.name: allocator for allocator in (UniformHeads, UtilityHeads)
}
TRIGGERS: dict[str, type[Trigger]] = {trigger.name: trigger for trigger in (BufferFull, EveryN, Never)}

# Names from papers for products of the parts above.
ALIASES: dict[str, str] = {
    "pyramid-rkv": "rkv+pyramid",
    "reasonalloc": "rkv+wave+utility",
}
