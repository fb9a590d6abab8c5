"""Every kernel alone, on memory laid out as a decode under a budget lays it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from validate.bench.clock import median_seconds
from validate.eviction.kernels.ops import Ops

# Memory that the timed calls go round in, so that none finds its own in a cache.
_ROUND_BYTES = 2**29
WINDOW, KERNEL_SIZE, THRESHOLD = 8, 7, 0.5


@dataclass(frozen=True, slots=True)
class Setting:
    """What kernels are measured on; ``entries`` and ``buffer`` are per KV head, on average.

    If ``ragged``, KV heads hold from a quarter of their equal share to 1.75 times it, else all the same.
    """

    n_rows: int
    n_kv_heads: int
    group_size: int
    head_dim: int
    entries: int
    buffer: int
    dtype: torch.dtype
    device: torch.device
    ragged: bool


Call = Callable[[], None]


class LayerMemory:
    """One layer's memory, full to the brim, and what kernels need beside it; of noise that a seed settles."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        generator = torch.Generator(setting.device).manual_seed(seed)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=setting.device, dtype=setting.dtype)

        lengths = torch.full((setting.n_rows, setting.n_kv_heads), setting.entries, dtype=torch.int64)
        if setting.ragged:
            shares = torch.linspace(0.25, 1.75, setting.n_kv_heads, dtype=torch.float64)
            lengths = (lengths * shares).round().long()
        lengths = (lengths + setting.buffer).reshape(-1)
        self.n_held = int(lengths.sum())
        self.longest = int(lengths.max())
        self.starts = (lengths.cumsum(0) - lengths).to(setting.device)
        self.lengths = lengths.int().to(setting.device)
        self.quotas = (self.lengths - setting.buffer).contiguous()
        self.keys, self.values = noise(self.n_held, setting.head_dim), noise(self.n_held, setting.head_dim)
        self.positions = torch.arange(self.n_held, dtype=torch.int32, device=setting.device)
        self.heads = noise(setting.n_rows, setting.n_kv_heads * setting.group_size, setting.head_dim)
        self.queries = noise(len(lengths), setting.group_size, WINDOW, setting.head_dim)
        self.output = torch.empty_like(self.heads)
        self.scores = torch.randn(self.n_held, generator=generator, device=setting.device)
        self.importance, self.repeated = (torch.empty_like(self.scores) for _ in range(2))
        self.survivors = torch.empty(self.n_held, dtype=torch.int32, device=setting.device)
        self.kept, self.counts = torch.empty_like(self.lengths), torch.empty_like(self.lengths)
        self.totals = self.quotas.view(setting.n_rows, -1).sum(1).int()

    @property
    def candidates(self) -> torch.Tensor:
        """Slots of all entries outside the observation windows."""
        return self._slots(self.lengths - WINDOW)

    @property
    def kept_slots(self) -> torch.Tensor:
        """Slots of what has survived, where each segment starts as before."""
        return self._slots(self.kept)

    def calls(self, ops: Ops) -> dict[str, Call]:
        """Return a call of each kernel, in the order of a compression; what it writes is its last array."""
        segments, longest = (self.starts, self.lengths), self.longest
        n_kv_heads, scale = self.setting.n_kv_heads, self.setting.head_dim**-0.5
        return {
            "attention": partial(
                ops.attend, self.heads, self.keys, self.values, *segments, self.output,
                scale=scale, longest=longest,
            ),
            "importance": partial(
                ops.window_importance, self.queries, self.keys, *segments, self.importance,
                scale=scale, window=WINDOW, longest=longest,
            ),
            "redundancy": partial(
                ops.redundancy, self.keys, *segments, self.repeated, threshold=THRESHOLD, longest=longest
            ),
            "scores": partial(
                ops.combine_scores, self.importance, self.repeated, *segments, self.scores,
                alpha=0.1, kernel_size=KERNEL_SIZE, window=WINDOW, longest=longest,
            ),
            "demand": partial(
                ops.demand, self.scores, *segments, self.totals, self.counts,
                n_kv_heads=n_kv_heads, longest=longest,
            ),
            "selection": partial(
                ops.select, self.scores, *segments, self.quotas, self.survivors, self.kept, longest=longest
            ),
            "compaction": partial(
                ops.compact, self.keys, self.values, self.positions, self.survivors,
                self.starts, self.kept, self.starts, n_kv_heads=n_kv_heads,
            ),
        }  # fmt: skip

    def _slots(self, lengths: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.starts.tolist(), lengths.tolist(), strict=True)
        ranges = [torch.arange(start, start + length) for start, length in pairs]
        return torch.cat(ranges).to(self.starts.device)


def kernel_cases(ops: Ops, setting: Setting, repeat: int) -> Iterator[dict[str, Any]]:
    """Time each kernel of one layer, and say how much memory it had to move at least.

    Yields
    ------
    dict
        ``kernel``, ``batch``, ``entries``, ``ragged``, ``seconds``, ``bytes`` (each input read and each
        output written once) and ``gflop``.
    """
    first = LayerMemory(setting, 0)
    n_layers = max(1, min(64, _ROUND_BYTES // (first.keys.nbytes + first.values.nbytes)))
    layers = [first.calls(ops)] + [LayerMemory(setting, seed).calls(ops) for seed in range(1, n_layers)]
    for name, (n_bytes, gflop) in _work(setting, first).items():
        yield {
            "kernel": name,
            "batch": setting.n_rows,
            "entries": setting.entries,
            "ragged": setting.ragged,
            "seconds": median_seconds([calls[name] for calls in layers], setting.device, repeat),
            "bytes": n_bytes,
            "gflop": gflop,
        }


def _work(setting: Setting, sample: LayerMemory) -> dict[str, tuple[int, float]]:
    """Return each kernel's bytes and GFLOP."""
    width = setting.head_dim * setting.dtype.itemsize
    held, kept = sample.n_held, int(sample.quotas.sum())
    pairs = float((sample.lengths.double() ** 2).sum())
    n_products = held * setting.group_size * setting.head_dim
    return {
        "attention": (2 * held * width, 4e-9 * n_products),
        "importance": (held * width + 4 * held, 2e-9 * n_products * WINDOW),
        "redundancy": (held * width + 4 * held, 2e-9 * pairs * setting.head_dim),
        "scores": (12 * held, 0.0),
        "demand": (4 * held, 0.0),
        "selection": (4 * held + 4 * kept, 0.0),
        "compaction": (4 * kept * width + 8 * kept, 0.0),
    }
