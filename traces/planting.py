"""What a synthetic trace contains, and where: the right answer that tests compare with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from traces.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Recipe:
    """The ingredients of a synthetic trace; zero leaves one out.

    Parameters
    ----------
    sinks : int
        How many of the first positions are attention sinks, in every head.
    sink_share : float
        Attention mass all sinks together receive from every query.
    hitters : int
        Heavy hitters per KV head: prompt positions attended throughout.
    hitter_share : float
        Attention mass all hitters of a head together receive from every query after them.
    needle_heads : int
        KV heads, of all layers, in which one prompt position is the needle.
    needle_share : float
        Mass the needle receives in its range of steps; sinks and hitters then have their share of
        what it leaves. Outside the range it receives next to none.
    needle_start, needle_stop : float
        Its range of steps, in parts of the decode.
    recency : float
        How strongly attention decays with distance; 1 gives the nearest entries about as much
        mass as all others together. In a head of less than some 30 dimensions distant positions
        look alike now and then, and the decay is rough.
    horizon : float
        Distance in tokens at which recency falls to 1/e.
    duplicates : int
        Pairs of positions with the same key, per KV head.
    drift : float
        From 0 to 1: how far each KV head swings between broad and concentrated over the run.
    noise : float
        Standard deviation of the logits that follow no plan.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """

    sinks: int = 4
    sink_share: float = 0.3
    hitters: int = 3
    hitter_share: float = 0.2
    needle_heads: int = 2
    needle_share: float = 0.9
    needle_start: float = 0.7
    needle_stop: float = 0.85
    recency: float = 1.0
    horizon: float = 32.0
    duplicates: int = 2
    drift: float = 0.6
    noise: float = 0.5

    def __post_init__(self) -> None:
        for name in ("sinks", "hitters", "needle_heads", "duplicates"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: an integer, 0 up")
        for name in ("sink_share", "hitter_share", "needle_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: between 0 and 1")
        if not self.sink_share + self.hitter_share < 1:
            total = self.sink_share + self.hitter_share
            raise ValueError(f"sink_share + hitter_share is {total}; allowed: less than 1")
        if not 0 <= self.needle_start < self.needle_stop <= 1:
            raise ValueError(
                f"needle_start and needle_stop are {self.needle_start} and {self.needle_stop}; "
                "allowed: 0 <= start < stop <= 1"
            )
        for name, most in {"recency": 2.0, "noise": 4.0, "drift": 1.0}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 to {most}")
        if not 1 <= self.horizon < float("inf"):
            raise ValueError(f"horizon is {self.horizon}; allowed: 1 token or more")


@dataclass(frozen=True, slots=True)
class Needle:
    """One position that almost all attention goes to, in some heads, for some steps.

    Attributes
    ----------
    position : int
    steps : tuple of int
        First token whose query attends to it, and the first that no longer does.
    heads : list of (layer, kv_head)
    """

    position: int
    steps: tuple[int, int]
    heads: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class HeadPlanting:
    """Where the ingredients lie in one KV head; the fields are those of `Planting`."""

    sinks: list[int]
    hitters: list[int]
    needle: Needle | None
    duplicates: list[tuple[int, int]]
    phase: float

    @property
    def planted(self) -> dict[str, list[int]]:
        """Return the positions whose attention is planned, by kind; kinds without any are absent."""
        kinds = {
            "sinks": self.sinks,
            "hitters": self.hitters,
            "needle": [self.needle.position] if self.needle else [],
        }
        return {kind: positions for kind, positions in kinds.items() if positions}

    @property
    def planted_positions(self) -> list[int]:
        """Return all positions whose attention is planned, sorted."""
        return sorted(position for group in self.planted.values() for position in group)


@dataclass(frozen=True, slots=True)
class Planting:
    """Where the ingredients of one synthetic trace lie.

    Attributes
    ----------
    sinks : list of int
        Positions, the same in every head.
    needle : Needle or None
    hitters : list
        Positions, by layer and KV head.
    duplicates : list
        Pairs of positions (earlier, later) with the same key, by layer and KV head.
    phases : list
        Phase of the drift in turns, by layer and KV head; see `concentration`.
    """

    sinks: list[int]
    needle: Needle | None
    hitters: list[list[list[int]]]
    duplicates: list[list[list[tuple[int, int]]]]
    phases: list[list[float]]

    def truth(self) -> dict[str, Any]:
        """Return the content as a dictionary for the manifest."""
        return asdict(self)

    def of_layer(self, layer: int) -> list[HeadPlanting]:
        """Return what lies in each KV head of a layer."""
        hitters, pairs, phases = self.hitters[layer], self.duplicates[layer], self.phases[layer]
        return [
            HeadPlanting(
                sinks=self.sinks,
                hitters=hitters[head],
                needle=self.needle if self.needle and (layer, head) in self.needle.heads else None,
                duplicates=pairs[head],
                phase=phases[head],
            )
            for head in range(len(phases))
        ]


def draw_planting(
    rng: np.random.Generator,
    recipe: Recipe,
    shape: ModelShape,
    prompt_tokens: int,
    total_tokens: int,
) -> Planting:
    """Draw where the ingredients lie.

    What a short trace has no room for is left out: the planting tells what is there.
    """
    sinks = list(range(min(recipe.sinks, prompt_tokens)))
    prompt = rng.permutation(np.arange(len(sinks), prompt_tokens)).tolist()
    needle = _draw_needle(rng, recipe, shape, prompt, prompt_tokens, total_tokens)
    taken = set(sinks) | ({needle.position} if needle else set())
    heads = [(layer, head) for layer in range(shape.n_layers) for head in range(shape.n_kv_heads)]
    hitters: dict[tuple[int, int], list[int]] = {}
    duplicates: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for head in heads:
        free = rng.permutation([position for position in prompt if position not in taken])
        hitters[head] = sorted(free[: recipe.hitters].tolist())
        special = taken | set(hitters[head])
        free = rng.permutation([j for j in range(total_tokens) if j not in special])
        pairs = free[: len(free) // 2 * 2].reshape(-1, 2)[: recipe.duplicates]
        duplicates[head] = [(min(pair), max(pair)) for pair in pairs.tolist()]
    phases = rng.random((shape.n_layers, shape.n_kv_heads)).round(6)
    return Planting(
        sinks,
        needle,
        _by_layer(hitters, shape),
        _by_layer(duplicates, shape),
        phases.tolist(),
    )


def concentration(recipe: Recipe, phase: float, tokens: np.ndarray, total_tokens: int) -> np.ndarray:
    """Return how concentrated a KV head is at each token, from 1 - drift to 1 + drift."""
    return 1 + recipe.drift * np.sin(2 * np.pi * (tokens / total_tokens + phase))


def _draw_needle(
    rng: np.random.Generator,
    recipe: Recipe,
    shape: ModelShape,
    candidates: list[int],
    prompt_tokens: int,
    total_tokens: int,
) -> Needle | None:
    n_decoded = total_tokens - prompt_tokens
    first = prompt_tokens + int(recipe.needle_start * n_decoded)
    stop = prompt_tokens + int(recipe.needle_stop * n_decoded)
    if not recipe.needle_heads or not candidates or first == stop:
        return None
    n_heads = shape.n_layers * shape.n_kv_heads
    chosen = rng.permutation(n_heads)[: recipe.needle_heads]
    heads = sorted(divmod(int(head), shape.n_kv_heads) for head in chosen)
    return Needle(candidates[0], (first, stop), heads)


def _by_layer(by_head: dict[tuple[int, int], Any], shape: ModelShape) -> list[list[Any]]:
    return [[by_head[layer, head] for head in range(shape.n_kv_heads)] for layer in range(shape.n_layers)]
