"""What each query head attends to, and a name for it by fixed rules.

Patterns are sets of positions ``j`` that the token ``t`` of a decode step can attend to:

- *sink*: the first token of the text.
- *previous*: ``t - 1``. *itself*: ``t``. *recent*: the 16 newest tokens, ``t`` included, without these two.
- *duplicate*: earlier tokens with the same id as ``t``.
- *induction*: tokens before ``t`` that follow an earlier token with the same id as ``t``.
- *goal*: in the prompt, what is asked for: from the word ``legs`` to ``end``.
- *prompt*: the rest of the prompt, without the sink.

They overlap: a duplicate may be recent, what follows it may be part of the prompt. Masses of one head
therefore need not sum to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from simulator.engine.full_cache import sampled_steps
from traces.numbers import to_float32
from traces.trace import Trace

NEWEST = 16
GOAL_OPENS, GOAL_CLOSES = "legs", "end"
# A specific pattern names a head from this mass on. The broad ones hold many tokens: they need more, and
# count only where no specific one does. In a short chain even a head that looks at everything alike has
# most of its mass on the prompt, so that a name also needs clearly more than such a head would have.
SPECIFIC = {
    "sink": "sink",
    "previous": "previous token",
    "itself": "itself",
    "induction": "induction",
    "duplicate": "duplicate token",
    "goal": "goal",
}
BROAD = {"recent": "recent", "prompt": "prompt"}
PATTERNS = (*SPECIFIC, *BROAD)
SPECIFIC_MASS, BROAD_MASS, TIMES_UNIFORM = 0.4, 0.5, 1.5
NAMES = (*SPECIFIC.values(), *BROAD.values(), "mixed")

# Weights of one block, float32: 16 MB; the masks of all patterns take as much again per pattern and head.
_BLOCK_ELEMENTS = 2**22
# Shown in a map: so many query tokens, and so many keys of those with at least one weight this large.
MAP_QUERIES, MAP_KEYS, MAP_WEIGHT = 24, 40, 0.03
MAPPED_NAMES = ("induction", "previous token", "sink", "goal", "duplicate token", "recent")


@dataclass(frozen=True)
class HeadMasses:
    """Attention mass of every query head on every pattern, averaged over decode steps.

    Attributes
    ----------
    mass : float64 (n_layers, n_query_heads, n_patterns)
        In the order of `PATTERNS`.
    uniform : float64 (n_patterns,)
        What a head would have that attends to all tokens alike.
    n_steps : int
    """

    mass: np.ndarray
    uniform: np.ndarray
    n_steps: int


def token_words(trace: Trace) -> list[str]:
    """Give the text of every token without blanks around it; its id where the trace has no text."""
    vocabulary = trace.manifest.vocabulary
    pieces = [vocabulary.get(token_id, str(token_id)) for token_id in trace.token_ids.tolist()]
    return [piece.strip() or ascii(piece)[1:-1] for piece in pieces]


def goal_positions(prompt: Sequence[str]) -> np.ndarray:
    """Mark the words of a prompt that say what is asked for; bool (n_words,)."""
    goal = np.zeros(len(prompt), bool)
    inside = False
    for position, word in enumerate(prompt):
        inside = inside or word == GOAL_OPENS
        goal[position] = inside
        inside = inside and word != GOAL_CLOSES
    return goal


def pattern_masks(token_ids: np.ndarray, goal: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Mark the keys of every pattern for some query tokens.

    Parameters
    ----------
    token_ids : int (total_tokens,)
    goal : bool (prompt_tokens,)
    positions : int (n,)
        Query tokens, increasing.

    Returns
    -------
    bool (n_patterns, n, positions[-1] + 1)
    """
    n_keys = int(positions[-1]) + 1
    query, key = positions[:, None], np.arange(n_keys)[None, :]
    same = token_ids[query] == token_ids[key]
    follows = np.zeros_like(same)
    follows[:, 1:] = same[:, :-1]
    in_goal = np.zeros(n_keys, bool)
    in_goal[: len(goal)] = goal[:n_keys]
    masks = {
        "sink": key == 0,
        "previous": key == query - 1,
        "itself": key == query,
        "induction": follows & (key < query),
        "duplicate": same & (key < query),
        "goal": in_goal & (key <= query),
        "recent": (key > query - NEWEST) & (key < query - 1),
        "prompt": ~in_goal & (key > 0) & (key < len(goal)) & (key <= query),
    }
    return np.stack([np.broadcast_to(masks[name], same.shape) for name in PATTERNS])


def head_weights(trace: Trace, layer: int, positions: np.ndarray) -> np.ndarray:
    """Return full-cache attention weights of every query head, for increasing ``positions`` of n queries.

    Returns
    -------
    float32 (n_query_heads, n, positions[-1] + 1)
        Zero for keys later than the query.
    """
    shape, n_keys = trace.shape, int(positions[-1]) + 1
    keys = np.repeat(trace.keys(layer, 0, n_keys), shape.group_size, axis=0)
    queries = to_float32(trace.stored(layer, "queries")[:, positions], shape.dtype)
    logits = queries @ keys.transpose(0, 2, 1) * np.float32(trace.scale)
    logits -= trace.stored(layer, "lse")[:, positions, None]
    logits[:, np.arange(n_keys)[None, :] > positions[:, None]] = -np.inf
    return np.exp(logits)


def mean_masses(traces: Sequence[Trace], steps_per_trace: int = 128) -> HeadMasses:
    """Average the mass of every head on every pattern over sampled decode steps of all traces.

    Every step counts alike. At least one trace with a decode step is needed, and all of one shape.
    """
    shape = traces[0].shape
    mass = np.zeros((shape.n_layers, shape.n_query_heads, len(PATTERNS)))
    uniform, n_steps = np.zeros(len(PATTERNS)), 0
    for trace in traces:
        token_ids = trace.token_ids
        goal = goal_positions(token_words(trace)[: trace.prompt_tokens])
        for positions in _blocks(trace, steps_per_trace):
            masks = pattern_masks(token_ids, goal, positions).astype(np.float32)
            uniform += (masks.sum(axis=2) / (positions + 1)).sum(axis=1)
            n_steps += len(positions)
            flat = masks.reshape(len(PATTERNS), -1).T
            for layer in range(shape.n_layers):
                weights = head_weights(trace, layer, positions)
                mass[layer] += weights.reshape(shape.n_query_heads, -1) @ flat
    return HeadMasses(mass / n_steps, uniform / n_steps, n_steps)


def _blocks(trace: Trace, steps_per_trace: int) -> Iterator[np.ndarray]:
    """Cut the sampled decode tokens so that the weights of one layer stay small."""
    steps = sampled_steps(trace.total_tokens - trace.prompt_tokens, steps_per_trace)
    n_rows = max(1, _BLOCK_ELEMENTS // (trace.shape.n_query_heads * trace.total_tokens))
    for start in range(0, len(steps), n_rows):
        yield steps[start : start + n_rows] + trace.prompt_tokens


def name_head(masses: Mapping[str, float], uniform: Mapping[str, float]) -> str:
    """Name a head by its strongest specific pattern, else by its strongest broad one, else ``mixed``.

    A specific pattern needs a mass of 0.4, a broad one 0.5, and either 1.5 times what a head has that
    attends to all tokens alike; of equal ones the first in order counts.
    """
    for names, threshold in ((SPECIFIC, SPECIFIC_MASS), (BROAD, BROAD_MASS)):
        enough = [name for name in names if masses[name] >= max(threshold, TIMES_UNIFORM * uniform[name])]
        if enough:
            return names[max(enough, key=lambda name: masses[name])]
    return "mixed"


def describe_heads(found: HeadMasses) -> dict[str, Any]:
    """Give every head's masses and name, and the share of each name per layer, as plain values."""
    uniform = dict(zip(PATTERNS, found.uniform.round(4).tolist(), strict=True))
    rows, layers = [], []
    for layer, heads in enumerate(found.mass.round(4).tolist()):
        named = []
        for head, values in enumerate(heads):
            masses = dict(zip(PATTERNS, values, strict=True))
            named.append(name_head(masses, uniform))
            rows.append({"layer": layer, "head": head, "name": named[-1], "masses": masses})
        layers.append({name: round(named.count(name) / len(named), 4) for name in NAMES if name in named})
    return {
        "steps": found.n_steps,
        "specific_mass": SPECIFIC_MASS,
        "broad_mass": BROAD_MASS,
        "times_uniform": TIMES_UNIFORM,
        "uniform": uniform,
        "rows": rows,
        "layers": layers,
    }


def typical_heads(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Choose the strongest head of each name that is drawn, at most six, among ``rows`` of all heads."""
    patterns = {name: pattern for pattern, name in (SPECIFIC | BROAD).items()}
    chosen = []
    for name in MAPPED_NAMES:
        named = [(row["masses"][patterns[name]], row) for row in rows if row["name"] == name]
        if named:
            mass, best = max(named, key=itemgetter(0))
            chosen.append({"layer": best["layer"], "head": best["head"], "name": name, "mass": mass})
    return chosen


def attention_map(trace: Trace, layer: int, head: int) -> dict[str, Any]:
    """Cut a window out of one head's attention that can be drawn with its words.

    The queries are the last decode tokens, at most 24. The keys are those that get a weight of 0.03 from
    at least one of them, at most 40: of more, those with the largest weights.

    Returns
    -------
    dict
        ``queries`` and ``keys``, each with ``positions`` and ``words``; ``weights``, (n_queries, n_keys);
        ``shown``, the mean share of a query's attention that the keys hold.
    """
    first = max(trace.prompt_tokens, trace.total_tokens - MAP_QUERIES)
    queries = np.arange(first, trace.total_tokens)
    weights = head_weights(trace, layer, queries)[head]
    largest = weights.max(axis=0)
    keys = np.sort(np.argsort(-largest, kind="stable")[:MAP_KEYS])
    keys = keys[largest[keys] >= MAP_WEIGHT]
    words = token_words(trace)
    shown = weights[:, keys]
    return {
        "queries": {"positions": queries.tolist(), "words": [words[position] for position in queries]},
        "keys": {"positions": keys.tolist(), "words": [words[position] for position in keys]},
        "weights": shown.round(3).astype(float).tolist(),
        "shown": round(float(shown.sum(axis=1).mean()), 4),
    }
