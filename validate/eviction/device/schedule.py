"""When each layer of each sequence compresses: kept on the host, which need not wait for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from simulator.policies.language import Policy

_NEVER = np.iinfo(np.int64).max


class Schedule:
    """The host's books of what layers hold, and when they are due.

    Where heads' budgets differ, only the device knows how many entries a compression left, since a head may
    be shorter than its budget. No compression follows within ``buffer`` tokens, so that the count is asked
    for then, when it has long arrived.

    Parameters
    ----------
    policy : Policy
    entries : int64 (n_layers, n_rows)
        Budgets per KV head.
    prompts : int64 (n_rows,)
        Tokens of each row's prompt.
    n_kv_heads : int
    held : int64 (n_layers, n_rows), optional
        Entries over all KV heads; the whole prompts by default.

    Attributes
    ----------
    totals : int64 (n_layers, n_rows)
        Budgets over all KV heads.
    n_tokens : int64 (n_rows,)
        Tokens in each row's history.
    n_compressions : int64 (n_layers, n_rows)
    """

    def __init__(
        self,
        policy: Policy,
        entries: np.ndarray,
        prompts: np.ndarray,
        n_kv_heads: int,
        held: np.ndarray | None = None,
    ) -> None:
        self._trigger, self._delta = policy.trigger, policy.heads.delta
        self._n_kv_heads = n_kv_heads
        self.totals, self.n_tokens = entries * n_kv_heads, prompts.astype(np.int64)
        whole = np.broadcast_to(prompts * n_kv_heads, entries.shape)
        self._base = (whole if held is None else held).astype(np.int64)
        self._since = np.broadcast_to(prompts, entries.shape).astype(np.int64)
        self._divided = np.full(entries.shape, -1, np.int64)
        self._is_counted = np.ones(entries.shape, bool)
        self.n_compressions = np.zeros(entries.shape, np.int64)
        self._counts: list[tuple[tuple[np.ndarray, np.ndarray], torch.Tensor, _Event | torch.cuda.Event]] = []
        self._held: np.ndarray | None = None
        self._due = np.full(entries.shape, _NEVER)
        if policy.evicts:
            self._reckon(...)

    @property
    def held(self) -> np.ndarray:
        """Entries of each row during the latest attention, over layers and KV heads; int64 (n_rows,)."""
        return self._count() if self._held is None else self._held

    def due_prompts(self, layer: int) -> np.ndarray:
        """Say whose prompt is compressed at its end, bool (n_rows,)."""
        return self._trigger.cuts_prompt(self.n_tokens * self._n_kv_heads, self.totals[layer])

    def to_divide(self) -> np.ndarray:
        """Say whose heads would be divided anew at a compression now, bool (n_layers, n_rows)."""
        if not self._delta:
            return np.zeros(self.totals.shape, bool)
        return (self._divided < 0) | (self.n_tokens - self._divided >= self._delta)

    def advance(self) -> np.ndarray:
        """Count one more token of each row, and say what is due now, bool (n_layers, n_rows)."""
        self.n_tokens = self.n_tokens + 1
        self._held = None
        due = self._due <= self.n_tokens
        if (due & ~self._is_counted).any():
            self._take_counts()
            due = self._due <= self.n_tokens
        return due

    def compressed(
        self, layers: np.ndarray, rows: np.ndarray, divided: np.ndarray, held: torch.Tensor
    ) -> None:
        """Note a compression.

        Parameters
        ----------
        layers, rows, divided : (n_due,)
            What was compressed, and whose heads were divided anew.
        held : int64 Tensor, shape (n_due,)
            Entries left over all KV heads, on the device.
        """
        if self._held is None:
            self._held = self._count()
        before = self._base[layers, rows]
        before = before + self._n_kv_heads * (self.n_tokens[rows] - self._since[layers, rows])
        self._since[layers, rows] = self.n_tokens[rows]
        self.n_compressions[layers, rows] += 1
        self._divided[layers[divided], rows[divided]] = self.n_tokens[rows[divided]]
        # Exact for heads of equal length; of others the most that may be left, so that none is due before.
        self._base[layers, rows] = np.minimum(before, self.totals[layers, rows])
        self._reckon((layers, rows))
        if self._delta:
            self._is_counted[layers, rows] = False
            self._counts.append(((layers, rows), *_to_host(held)))

    def keep_rows(self, rows: np.ndarray) -> None:
        """Forget all other rows."""
        self._take_counts()
        self.n_tokens = self.n_tokens[rows]
        if self._held is not None:
            self._held = self._held[rows]
        for name in ("totals", "n_compressions", "_base", "_since", "_divided", "_is_counted", "_due"):
            setattr(self, name, getattr(self, name)[:, rows])

    def _count(self) -> np.ndarray:
        self._take_counts()
        return (self._base + self._n_kv_heads * (self.n_tokens - self._since)).sum(0)

    def _take_counts(self) -> None:
        """Wait for the counts under way."""
        for at, counts, event in self._counts:
            event.synchronize()
            self._base[at] = counts.numpy()
        self._counts = []
        if not self._is_counted.all():
            self._reckon(~self._is_counted)

    def _reckon(self, at: Any) -> None:
        """Settle when those ``at`` an index are due, by what they held last."""
        held = self._since[at], self._base[at], self.totals[at]
        self._due[at] = self._trigger.next_compression(*held, self._n_kv_heads)
        self._is_counted[at] = True


class _Event:
    """What has happened already, on a device that does not run ahead of the host."""

    def synchronize(self) -> None:
        """Return."""


def _to_host(counts: torch.Tensor) -> tuple[torch.Tensor, _Event | torch.cuda.Event]:
    """Begin to copy counts to the host; they are there once the event has happened."""
    if counts.device.type != "cuda":
        return counts.clone(), _Event()
    copy = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    copy.copy_(counts, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event
