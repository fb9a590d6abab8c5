"""The four parts of a policy, as a newcomer writes them: scorer, layer allocator, head allocator, trigger."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from simulator.policies.protection import Ends
from simulator.policies.ranges import Limit, Ranges, declared
from simulator.policies.view import CacheView, LayerView
from traces.errors import UserError

if TYPE_CHECKING:
    from simulator.policies.wave import Wave

# How survivors are laid out, and what becomes of a prompt; see ``Scorer.slot_order`` and ``Trigger.prompt``.
SLOT_ORDERS = ("chronological", "score")
PROMPT_MODES = ("compress", "wait", "keep")
# One layer's count, or those of many layers, of any shape.
Counts = TypeVar("Counts", int, np.ndarray)


class PolicyError(UserError):
    """A part of a policy that broke its contract: wrong shape, not finite, wrong total."""

    exit_code = 1


class Part(ABC):
    """Base of the four parts. Subclass one of them as a frozen dataclass, whose fields are its parameters.

    Attributes
    ----------
    name : str
        What it is called on the command line.
    source : str
        Paper and, where there is one, code.
    searched : mapping of str to Range or Choices
        How far a search may turn a parameter; the others stay at their defaults.
    files : tuple of str
        Parameters that may be the path of a file, so that results can tell its content.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    searched: ClassVar[Ranges] = {}
    files: ClassVar[tuple[str, ...]] = ()
    _limits: ClassVar[Mapping[str, Limit]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        limits, searched = declared(cls)
        # Kept apart from the fields: a subclass that changes a default changes neither limit nor range.
        cls._limits = {**cls._limits, **limits}
        if searched:
            cls.searched = {**cls.searched, **searched}

    def __post_init__(self) -> None:
        for name, limit in self._limits.items():
            value = getattr(self, name)
            refuse_unless(limit.allows(value), name, value, limit.words)

    @property
    def needs(self) -> frozenset[str]:
        """Data beyond queries and keys: ``values`` or ``rope`` for scorers, a ``wave`` for allocators."""
        return frozenset()


class Scorer(Part):
    """Says how much each entry of one KV head is worth keeping.

    Attributes
    ----------
    sinks, recent : int
        First positions and last entries that are never evicted, unless the policy is to ``protect`` others.
    slot_order : str
        How survivors are laid out: ``chronological``, or ``score`` (best first, then the recent entries),
        which matters to scorers that look at neighbouring slots.
    stateful : bool
        Whether the scorer notes something of each entry, by ``observe``.
    """

    stateful: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "score" in vars(cls) and "score_layer" not in vars(cls):
            cls.score_layer = Scorer.score_layer  # type: ignore[method-assign]

    @property
    def window(self) -> int:
        """How many of the last queries the view has to show."""
        return 0

    @property
    def sees_span(self) -> bool:
        """Whether the view has to show every query since the last compression instead."""
        return False

    @property
    def sinks(self) -> int:
        """First positions protected."""
        return 0

    @property
    def recent(self) -> int:
        """Last entries protected."""
        return 0

    def ends(self, view: CacheView | LayerView) -> Ends:
        """Give what of a view is protected: what the scorer protects, unless the policy says otherwise."""
        return Ends(self.sinks, self.recent) if view.protected is None else view.protected

    @property
    def slot_order(self) -> str:
        """Layout of survivors."""
        return "chronological"

    @property
    def reuses_products(self) -> bool:
        """Whether ``LayerView.products`` are of use to ``score_layer``."""
        return False

    @abstractmethod
    def score(self, view: CacheView) -> np.ndarray:
        """Score every entry, higher is kept; float32 (n_entries,). Protected entries' scores are ignored."""

    def score_layer(self, layer: LayerView, memory: Any = None) -> Sequence[np.ndarray]:
        """Score all KV heads of a layer; for scorers that judge them together, or sooner than one by one.

        ``memory`` is what ``new_memory`` gave for this layer of this request. A subclass that overrides
        ``score`` and not this is asked head by head.
        """
        return [self.score(view) for view in layer.heads]

    def new_memory(self) -> Any:
        """Give an object that ``score_layer`` may change to remember what it would otherwise compute again.

        It may make scores come sooner, never other.
        """
        return None

    def observe(self, view: CacheView) -> np.ndarray:
        """Give what to note of each entry, float32 (n_entries,); ``view.state`` holds what was noted."""
        raise NotImplementedError(f"scorer '{self.name}' is stateful but does not say what it observes")

    def quota(self, budget: int, n_tokens: int) -> int:
        """Give how much of its budget a head may fill after so many tokens."""
        return budget


@dataclass(frozen=True, slots=True)
class LayerRequest:
    """What a layer allocator divides.

    Attributes
    ----------
    n_layers : int
    entries : int
        Mean budget, in entries per KV head.
    protected : int
        Entries no KV head can do without.
    model, model_revision, trace_id : str
        The model, for profiles measured per model, and the trace to be judged.
    waves : dict
        Known demand profiles by model name.
    n_kv_heads : int
    views : sequence of sequences of CacheView
        What every KV head of every layer holds now; only for dynamic allocators.
    """

    n_layers: int
    entries: int
    protected: int
    model: str
    model_revision: str
    trace_id: str
    waves: dict[str, Wave]
    n_kv_heads: int = 1
    views: Sequence[Sequence[CacheView]] = ()


@dataclass(frozen=True, slots=True, eq=False)
class HeadRequest:
    """What a head allocator divides.

    Attributes
    ----------
    scores : sequence of float32 (n_entries of that head,)
        Scores of what each head holds; protected entries are plus infinity.
    total : int
        The layer's entries over all heads.
    protected : int
        Entries no head can do without.
    layer : int
    table : float64 (n_kv_heads,), optional
        The layer's row of the allocator's ``table``.
    """

    scores: Sequence[np.ndarray]
    total: int
    protected: int
    layer: int = 0
    table: np.ndarray | None = None

    @property
    def n_heads(self) -> int:
        """KV heads."""
        return len(self.scores)


class LayerAllocator(Part):
    """Divides the budget over layers, when a request arrives.

    Attributes
    ----------
    dynamic : bool
        Whether it looks at what the layers hold: it then divides after the prompt was read, and again every
        ``layer_delta`` decode steps.
    layer_delta : int
        0 never divides again.
    exact : bool
        Whether the budgets sum to the total; published code may not.
    """

    dynamic: ClassVar[bool] = False
    exact: ClassVar[bool] = True

    @property
    def layer_delta(self) -> int:
        """Decode steps between reallocations."""
        return 0

    @property
    def window(self) -> int:
        """How many of the last queries the views have to show."""
        return 0

    @abstractmethod
    def allocate(self, request: LayerRequest) -> tuple[np.ndarray, bool]:
        """Give entries per KV head for each layer, int64 (n_layers,), summing to n_layers * entries.

        The second value says whether the protected entries were a binding lower bound.
        """


class HeadAllocator(Part):
    """Divides one layer's budget over its KV heads."""

    @property
    def delta(self) -> int:
        """Decode steps between reallocations; 0 never reallocates, so every head keeps its equal share."""
        return 0

    def table(self, request: LayerRequest) -> np.ndarray | None:
        """Give what is known of the model's heads beforehand, float64 (n_layers, n_kv_heads), or None."""
        return None

    @abstractmethod
    def allocate(self, request: HeadRequest) -> tuple[np.ndarray, bool]:
        """Give each head's budget, int64 (n_kv_heads,), summing to the request's total.

        The second value says whether the protected entries were a binding lower bound.
        """


class Trigger(Part):
    """Says when a layer compresses.

    Attributes
    ----------
    evicts : bool
        Whether it ever fires.
    """

    evicts: ClassVar[bool] = True

    @property
    def reads_tokens(self) -> bool:
        """Whether ``fires_on`` looks at tokens."""
        return type(self).fires_on is not Trigger.fires_on

    @property
    def reads_text(self) -> bool:
        """Whether ``resolved`` has to know the text of tokens."""
        return False

    @property
    def prompt(self) -> str:
        """``compress`` the prompt at the end of prefill, ``wait`` for the first trigger, or ``keep`` it."""
        return "compress"

    def resolved(self, vocabulary: Mapping[int, str]) -> Trigger:
        """Give the trigger with what it needs to know of the token ids."""
        return self

    def fires_on(self, token_ids: np.ndarray) -> np.ndarray:
        """Say at which newest tokens a due compression happens; bool, as ``token_ids``."""
        return np.ones(len(token_ids), bool)

    def cuts_prompt(self, n_entries: Counts, total: Counts) -> Any:
        """Say whether a prompt that fills so many entries is compressed at its end; bool, as the counts."""
        return (n_entries > total) & (self.prompt == "compress")

    def most_added(self, n_kv_heads: int) -> int | None:
        """Give the most entries beyond its budget that a layer ever holds, or None where nothing bounds it.

        A budget that caps the peak needs it, of a layer that once was within its budget.
        """
        return None

    @abstractmethod
    def next_compression(self, n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int | None:
        """Give the token count of the next compression if nothing is evicted before, or None for never.

        Parameters
        ----------
        n_tokens : int
            Tokens in the cache's history now.
        n_entries, total : int
            Entries the layer holds now, and its budget, over all KV heads. Triggers of the package also work
            on int arrays of these three, of many layers at once.
        n_kv_heads : int
            How many entries each further token adds.
        """


def refuse_unless(condition: bool, what: str, found: object, allowed: str) -> None:
    """Raise a ValueError that names a parameter, the value found and what is allowed."""
    if not condition:
        raise ValueError(f"{what} is {found!r}; allowed: {allowed}")
