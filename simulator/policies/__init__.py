"""Published policies and their parts, by the name used on the command line.

To add one, write a class in a new file here and name it in one of these tables.
"""

from simulator.policies.adakv import AdaKV
from simulator.policies.append_only import AppendOnly
from simulator.policies.base import HeadAllocator, LayerAllocator, Scorer, Trigger
from simulator.policies.cake import Cake
from simulator.policies.criticalkv import CriticalKV
from simulator.policies.custom import CustomHeads, CustomLayers
from simulator.policies.duo import Duo
from simulator.policies.expected_attention import ExpectedAttention
from simulator.policies.full import Full
from simulator.policies.h2o import H2O
from simulator.policies.headkv import HeadKV, TableLayers
from simulator.policies.heads import UniformHeads, UtilityHeads
from simulator.policies.keydiff import KeyDiff
from simulator.policies.knorm import KeyNorm
from simulator.policies.lagkv import LagKV
from simulator.policies.layers import PyramidCode, PyramidLayers, UniformLayers, WaveLayers
from simulator.policies.random import Random, RandomPrompt
from simulator.policies.recency import Recency
from simulator.policies.rkv import RKV
from simulator.policies.snapkv import SnapKV
from simulator.policies.snapkv_paper import PaperSnapKV
from simulator.policies.squeeze import Squeeze
from simulator.policies.streaming_llm import StreamingLLM
from simulator.policies.tova import TOVA
from simulator.policies.triggers import BufferFull, EveryN, Never, PerStep, Segment
from simulator.policies.vatp import VATP
from simulator.policies.wave_dynamic import WaveDynamic

SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer
    for scorer in (
        Full,
        StreamingLLM,
        SnapKV,
        RKV,
        Random,
        RandomPrompt,
        H2O,
        TOVA,
        PaperSnapKV,
        KeyDiff,
        KeyNorm,
        LagKV,
        ExpectedAttention,
        VATP,
        CriticalKV,
        Recency,
        AppendOnly,
    )
}
LAYER_ALLOCATORS: dict[str, type[LayerAllocator]] = {
    allocator.name: allocator
    for allocator in (
        UniformLayers,
        PyramidLayers,
        WaveLayers,
        PyramidCode,
        WaveDynamic,
        Cake,
        Squeeze,
        TableLayers,
        CustomLayers,
    )
}
HEAD_ALLOCATORS: dict[str, type[HeadAllocator]] = {
    allocator.name: allocator for allocator in (UniformHeads, UtilityHeads, AdaKV, HeadKV, Duo, CustomHeads)
}
TRIGGERS: dict[str, type[Trigger]] = {
    trigger.name: trigger for trigger in (BufferFull, EveryN, PerStep, Segment, Never)
}

# Names from papers for products of the parts above, and from code for parameters; the user's own win.
ALIASES: dict[str, str] = {
    "pyramid-rkv": "rkv+pyramid",
    "reasonalloc": "rkv+wave+utility",
    "rkv-code": "rkv:slot_order=score,no_match=column0,alpha=0.07",
    "pyramidkv": "snapkv-paper+pyramid",
    "ada-snapkv": "snapkv-paper+adakv",
    "headkv-snapkv": "snapkv-paper+table+headkv",
    "cakekv": "snapkv-paper+cake",
}
