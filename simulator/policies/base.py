"""The four parts of a policy, as a newcomer writes them: scorer, layer allocator, head allocator, trigger."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from simulator.view import CacheView
from traces.errors import UserError

if TYPE_CHECKING:
    from simulator.wave import Wave


class PolicyError(UserError):
    """A part of a policy that broke its contract: wrong shape, not finite, wrong total."""

    exit_code = 1


class Scorer(ABC):
    """Says how much each entry of one KV head is worth keeping. Subclass as a frozen dataclass.

    Attributes
    ----------
    name : str
        What it is called on the command line.
    source : str
        Paper and, where there is one, code.
    window : int
        How many of the last queries the view has to show.
    sinks, recent : int
        First positions and last entries that are never evicted.
    slot_order : str
        How survivors are laid out: ``chronological``, or ``score`` (best first, then the recent entries),
        which matters to scorers that look at neighbouring slots.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""

    @property
    def window(self) -> int:
        """Queries observed."""
        return 0

    @property
    def sinks(self) -> int:
        """First positions protected."""
        return 0

    @property
    def recent(self) -> int:
        """Last entries protected."""
        return 0

    @property
    def slot_order(self) -> str:
        """Layout of survivors."""
        return "chronological"

    @abstractmethod
    def score(self, view: CacheView) -> np.ndarray:
        """Score every entry, higher is kept; float32 (n_entries,). Protected entries' scores are ignored."""


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
    """

    n_layers: int
    entries: int
    protected: int
    model: str
    model_revision: str
    trace_id: str
    waves: dict[str, Wave]


class LayerAllocator(ABC):
    """Divides the budget over layers, once per request."""

    name: ClassVar[str]
    source: ClassVar[str] = ""

    @abstractmethod
    def allocate(self, request: LayerRequest) -> tuple[np.ndarray, bool]:
        """Give entries per KV head for each layer, int64 (n_layers,), summing to n_layers * entries.

        The second value says whether the protected entries were a binding lower bound.
        """


class HeadAllocator(ABC):
    """Divides one layer's budget over its KV heads.

    Attributes
    ----------
    delta : int
        Decode steps between reallocations; 0 never reallocates, so every head keeps its equal share.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""

    @property
    def delta(self) -> int:
        """Decode steps between reallocations."""
        return 0

    @abstractmethod
    def allocate(self, scores: Sequence[np.ndarray], total: int, protected: int) -> tuple[np.ndarray, bool]:
        """Give each head's budget, int64 (n_kv_heads,), summing to ``total``.

        Parameters
        ----------
        scores : sequence of float32 (n_entries of that head,)
            Scores of what each head holds; protected entries are plus infinity.
        total : int
            The layer's entries over all heads.
        protected : int
            Entries no head can do without.
        """


class Trigger(ABC):
    """Says when a layer compresses."""

    name: ClassVar[str]
    source: ClassVar[str] = ""

    @property
    def prompt(self) -> str:
        """``compress`` the prompt at the end of prefill, or ``wait`` for the first trigger."""
        return "compress"

    @abstractmethod
    def next_compression(self, n_tokens: int, n_entries: int, total: int, n_kv_heads: int) -> int | None:
        """Give the token count of the next compression if nothing is evicted before, or None for never.

        Parameters
        ----------
        n_tokens : int
            Tokens in the cache's history now.
        n_entries, total : int
            Entries the layer holds now, and its budget, over all KV heads.
        n_kv_heads : int
            How many entries each further token adds.
        """


def refuse_unless(condition: bool, what: str, found: object, allowed: str) -> None:
    """Raise a ValueError that names a parameter, the value found and what is allowed."""
    if not condition:
        raise ValueError(f"{what} is {found!r}; allowed: {allowed}")
