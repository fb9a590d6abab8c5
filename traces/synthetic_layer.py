"""Queries and keys of one synthetic layer, made so that a planned attention follows from them.

The coordinates of a head are divided: one each for sinks, heavy hitters and the needle, some for a
random walk along positions (recency), the others for noise. Ordinary keys are zero in the first
three. So the mass that a query gives to a planted group is set by one of its coordinates, which is
solved for the share the recipe asks, and all other logits stay as they are.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.signal import lfilter

from traces.lse import causal_lse
from traces.numbers import round_to_storage, to_float32
from traces.planting import HeadPlanting, Recipe, concentration
from traces.shape import ModelShape

MIN_HEAD_DIM = 8

_AXES = {"sinks": 0, "hitters": 1, "needle": 2}
# What the needle receives outside its range of steps.
_QUIET_SHARE = 1e-6
# A logit that is no attention at all, and still far from overflow.
_EXCLUDED = -10_000.0


class SyntheticLayer:
    """One layer: all its keys at once, its queries in chunks.

    Parameters
    ----------
    seed : np.random.SeedSequence
    shape : ModelShape
    scale : float
        Attention scale.
    recipe : Recipe
    heads : list of HeadPlanting
        One for each KV head.
    total_tokens : int
    """

    def __init__(
        self,
        seed: np.random.SeedSequence,
        shape: ModelShape,
        scale: float,
        recipe: Recipe,
        heads: list[HeadPlanting],
        total_tokens: int,
    ) -> None:
        self.shape = shape
        self.scale = scale
        self.recipe = recipe
        self.heads = heads
        self.total_tokens = total_tokens
        first_noise = len(_AXES) + (shape.head_dim - len(_AXES) + 1) // 2
        self._walk = slice(len(_AXES), first_noise)
        self._noise = slice(first_noise, shape.head_dim)
        # Length of a key's walk, and of its mark on a planted axis: logits of the order of 10 are
        # then made of query and key coordinates of like size.
        self._amplitude = math.sqrt(8 / scale)
        self._rng = np.random.default_rng(seed)
        self._stored_keys = np.stack([self._make_keys(head) for head in heads])
        # As the ordinary pass wants them: planted positions cannot be seen.
        self._ordinary_keys = to_float32(self._stored_keys, shape.dtype)
        for kv_head, head in enumerate(heads):
            self._ordinary_keys[kv_head, head.planted_positions, 0] = _EXCLUDED

    def keys(self, tokens: np.ndarray) -> np.ndarray:
        """Return keys as stored, (n_kv_heads, n, head_dim)."""
        return self._stored_keys[:, tokens]

    def values(self, n: int) -> np.ndarray:
        """Draw the values of the next ``n`` tokens as stored, (n_kv_heads, n, head_dim)."""
        noise = self._rng.standard_normal((self.shape.n_kv_heads, n, self.shape.head_dim))
        return round_to_storage(noise, self.shape.dtype)

    def queries(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw the queries of consecutive tokens, and compute their log-sum-exp.

        Returns
        -------
        queries : np.ndarray
            As stored, (n_query_heads, n, head_dim).
        lse : np.ndarray
            float32 (n_query_heads, n).
        """
        queries = self._ordinary_queries(tokens)
        # A planted key has -10,000 at the first coordinate in this pass, any other has 0.
        queries[..., 0] = 1 / self.scale
        past_keys = self._ordinary_keys[:, : tokens[-1] + 1]
        ordinary_lse = causal_lse(queries, past_keys, self.scale, int(tokens[0]))
        queries[..., 0] = 0
        lse = np.empty(ordinary_lse.shape, dtype=np.float32)
        for kv_head in range(self.shape.n_kv_heads):
            group = slice(kv_head * self.shape.group_size, (kv_head + 1) * self.shape.group_size)
            lse[group] = self._plant(kv_head, queries[group], ordinary_lse[group], tokens)
        # Exact by now: every coordinate has been rounded.
        return round_to_storage(queries, self.shape.dtype), lse

    def _make_keys(self, head: HeadPlanting) -> np.ndarray:
        """Draw the keys of one KV head as stored, (total_tokens, head_dim)."""
        keys = np.zeros((self.total_tokens, self.shape.head_dim))
        # An autoregressive walk: the cosine of two positions falls as exp(-distance / horizon).
        memory = math.exp(-1 / self.recipe.horizon)
        steps = self._rng.standard_normal(keys[:, self._walk].shape)
        steps[1:] *= math.sqrt(1 - memory**2)
        walk = lfilter([1.0], [1.0, -memory], steps, axis=0)
        keys[:, self._walk] = self._amplitude * walk / np.linalg.norm(walk, axis=1, keepdims=True)
        noise = self._rng.standard_normal(keys[:, self._noise].shape)
        keys[:, self._noise] = self._amplitude * noise / math.sqrt(noise.shape[1])
        for kind, positions in head.planted.items():
            keys[positions, _AXES[kind]] = self._amplitude
        for earlier, later in head.duplicates:
            keys[later] = keys[earlier]
        return round_to_storage(keys, self.shape.dtype)

    def _ordinary_queries(self, tokens: np.ndarray) -> np.ndarray:
        """Draw rounded queries that know of recency and noise only, float32."""
        shape, recipe = self.shape, self.recipe
        unit = 1 / (self.scale * self._amplitude)
        queries = np.zeros((shape.n_query_heads, len(tokens), shape.head_dim))
        for kv_head, head in enumerate(self.heads):
            group = queries[kv_head * shape.group_size :][: shape.group_size]
            strength = concentration(recipe, head.phase, tokens, self.total_tokens)[:, np.newaxis]
            walk = to_float32(self._stored_keys[kv_head, tokens, self._walk], shape.dtype)
            # One near entry then outweighs as many far ones as there are, at recency 1.
            nearest = recipe.recency * np.log(2 + tokens)[:, np.newaxis]
            group[..., self._walk] = strength * nearest * unit * walk / self._amplitude
            noise = self._rng.standard_normal(group[..., self._noise].shape)
            group[..., self._noise] = strength * recipe.noise * unit * noise
        return self._rounded(queries)

    def _plant(
        self, kv_head: int, queries: np.ndarray, ordinary_lse: np.ndarray, tokens: np.ndarray
    ) -> np.ndarray:
        """Set the planted coordinates of one KV head's queries in place; return their LSE."""
        head = self.heads[kv_head]
        has_ordinary = tokens >= np.searchsorted(head.planted_positions, tokens, side="right")
        # With nothing ordinary to compare with, any reference will do.
        reference = np.where(has_ordinary, ordinary_lse, 0.0)
        lse = np.where(has_ordinary, ordinary_lse, -np.inf)
        shares = self._shares(head, tokens)
        rest = 1 - sum(shares.values(), np.zeros(len(tokens)))
        for kind, share in shares.items():
            axis, positions = _AXES[kind], np.array(head.planted[kind])
            keys = to_float32(self._stored_keys[kv_head, positions], self.shape.dtype)
            logits = self.scale * np.einsum("qtd,jd->jqt", queries, keys, dtype=np.float64)
            logits = np.where(positions[:, np.newaxis, np.newaxis] <= tokens, logits, -np.inf)
            group_lse = np.logaddexp.reduce(logits, axis=0)
            mark = self.scale * float(keys[0, axis])
            ratio = np.log(share / rest, where=share > 0, out=np.zeros(len(tokens)))
            coordinate = np.where(share > 0, (ratio + reference - group_lse) / mark, 0.0)
            queries[..., axis] = self._rounded(coordinate)
            lse = np.logaddexp(lse, group_lse + mark * queries[..., axis])
        return lse.astype(np.float32)

    def _shares(self, head: HeadPlanting, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Return the mass that each kind of planted position shall receive at each token."""
        needle = np.zeros(len(tokens))
        if head.needle:
            first, stop = head.needle.steps
            asked = (first <= tokens) & (tokens < stop)
            needle = np.where(asked, self.recipe.needle_share, _QUIET_SHARE)
        shares = {
            "sinks": self.recipe.sink_share * (1 - needle),
            "hitters": self.recipe.hitter_share * (1 - needle),
            "needle": needle,
        }
        return {
            kind: np.where(tokens >= min(positions), shares[kind], 0.0)
            for kind, positions in head.planted.items()
        }

    def _rounded(self, numbers: np.ndarray) -> np.ndarray:
        """Return the stored numbers as float32."""
        return to_float32(round_to_storage(numbers, self.shape.dtype), self.shape.dtype)
