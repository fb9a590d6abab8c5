"""Published policies and their parts, by the name used on the command line.

To add one, write a class in a new file of its role's folder and name it in one of these tables.
"""

from typing import TypeVar

from simulator.policies.heads.adakv import AdaKV
from simulator.policies.heads.custom import CustomHeads
from simulator.policies.heads.duo import Duo
from simulator.policies.heads.headkv import HeadKV
from simulator.policies.heads.uniform import UniformHeads
from simulator.policies.heads.utility import UtilityHeads
from simulator.policies.layers.cake import Cake
from simulator.policies.layers.custom import CustomLayers
from simulator.policies.layers.pyramid import PyramidCode, PyramidLayers
from simulator.policies.layers.squeeze import Squeeze
from simulator.policies.layers.table import TableLayers
from simulator.policies.layers.uniform import UniformLayers
from simulator.policies.layers.wave import WaveLayers
from simulator.policies.layers.wave_dynamic import WaveDynamic
from simulator.policies.parts import HeadAllocator, LayerAllocator, Part, Scorer, Trigger
from simulator.policies.scorers.append_only import AppendOnly
from simulator.policies.scorers.criticalkv import CriticalKV
from simulator.policies.scorers.expected_attention import ExpectedAttention
from simulator.policies.scorers.full import Full
from simulator.policies.scorers.gkv import GKV
from simulator.policies.scorers.h2o import H2O
from simulator.policies.scorers.keydiff import KeyDiff
from simulator.policies.scorers.knorm import KeyNorm
from simulator.policies.scorers.lagkv import LagKV
from simulator.policies.scorers.random import Random, RandomPrompt, RandomUnified
from simulator.policies.scorers.recency import Recency
from simulator.policies.scorers.rkv import RKV
from simulator.policies.scorers.snapkv import SnapKV
from simulator.policies.scorers.snapkv_paper import PaperSnapKV
from simulator.policies.scorers.streaming_llm import StreamingLLM
from simulator.policies.scorers.tova import TOVA
from simulator.policies.scorers.vase import VaSE
from simulator.policies.scorers.vatp import VATP
from simulator.policies.triggers.buffer_full import BufferFull
from simulator.policies.triggers.every_n import EveryN
from simulator.policies.triggers.never import Never
from simulator.policies.triggers.per_step import PerStep
from simulator.policies.triggers.segment import Segment

Kind = TypeVar("Kind", bound=Part)


def _by_name(*parts: type[Kind]) -> dict[str, type[Kind]]:
    return {part.name: part for part in parts}


SCORERS: dict[str, type[Scorer]] = _by_name(
    Full,
    StreamingLLM,
    SnapKV,
    RKV,
    Random,
    RandomPrompt,
    RandomUnified,
    H2O,
    TOVA,
    PaperSnapKV,
    KeyDiff,
    KeyNorm,
    LagKV,
    ExpectedAttention,
    VATP,
    CriticalKV,
    GKV,
    VaSE,
    Recency,
    AppendOnly,
)
LAYER_ALLOCATORS: dict[str, type[LayerAllocator]] = _by_name(
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
HEAD_ALLOCATORS: dict[str, type[HeadAllocator]] = _by_name(
    UniformHeads, UtilityHeads, AdaKV, HeadKV, Duo, CustomHeads
)
TRIGGERS: dict[str, type[Trigger]] = _by_name(BufferFull, EveryN, PerStep, Segment, Never)

# Names from papers for products of the parts above, and from code for parameters; the user's own win.
ALIASES: dict[str, str] = {
    "pyramid-rkv": "rkv+pyramid",
    "reasonalloc": "rkv+wave+utility",
    "rkv-code": "rkv:slot_order=score,no_match=column0,alpha=0.07",
    "pyramidkv": "snapkv-paper+pyramid",
    "ada-snapkv": "snapkv-paper+adakv",
    "headkv-snapkv": "snapkv-paper+table+headkv",
    "cakekv": "snapkv-paper+cake",
    "random-attention": "random:protect=prompt+recent:64,buffer=64",
}
