"""Synthetic traces: recorded like a model's, but made so that their attention is known."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from traces.planting import Recipe, draw_planting
from traces.seeds import require_seed
from traces.shape import ModelShape
from traces.synthetic_layer import MIN_HEAD_DIM, SyntheticLayer
from traces.trace import Trace
from traces.writer import TraceWriter

__all__ = ["Recipe", "make_synthetic"]

N_TOKEN_KINDS = 1000
_CHUNK = 512


def make_synthetic(
    path: str | Path,
    *,
    shape: ModelShape,
    prompt_tokens: int,
    total_tokens: int,
    seed: int,
    recipe: Recipe | None = None,
    with_values: bool = False,
    overwrite: bool = False,
) -> Trace:
    """Make a trace whose attention is known.

    Memory is bounded by the keys of one layer. The same arguments give the same ``trace_id``.

    Parameters
    ----------
    path : str or Path
        The directory to create, ``NAME.kvtrace``.
    shape : ModelShape
        ``head_dim`` of at least 8.
    prompt_tokens, total_tokens : int
    seed : int
        At least 0.
    recipe : Recipe, optional
    with_values : bool
        Whether to add values, which are plain noise.
    overwrite : bool
        Whether a finished trace at ``path`` may be replaced.

    Returns
    -------
    Trace
        ``manifest.task["truth"]`` holds the fields of `Planting`, ``manifest.task["recipe"]``
        those of `Recipe`.

    Raises
    ------
    ValueError
        If the shape or a count is out of range.
    UserError
        If ``path`` cannot be written to.
    """
    recipe = recipe or Recipe()
    if shape.head_dim < MIN_HEAD_DIM:
        raise ValueError(f"head_dim is {shape.head_dim}; allowed: {MIN_HEAD_DIM} or more")
    if not 1 <= prompt_tokens <= total_tokens:
        raise ValueError(f"prompt_tokens is {prompt_tokens}; allowed: 1 to {total_tokens}")
    require_seed(seed)
    plan_seed, *layer_seeds = np.random.SeedSequence(seed).spawn(1 + shape.n_layers)
    rng = np.random.default_rng(plan_seed)
    planting = draw_planting(rng, recipe, shape, prompt_tokens, total_tokens)
    token_ids = rng.integers(N_TOKEN_KINDS, size=total_tokens)
    with TraceWriter(path, shape, with_values=with_values, overwrite=overwrite) as writer:
        for layer, layer_seed in enumerate(layer_seeds):
            heads = planting.of_layer(layer)
            made = SyntheticLayer(layer_seed, shape, writer.scale, recipe, heads, total_tokens)
            for start in range(0, total_tokens, _CHUNK):
                tokens = np.arange(start, min(start + _CHUNK, total_tokens))
                queries, lse = made.queries(tokens)
                values = made.values(len(tokens)) if with_values else None
                writer.append(layer, queries, made.keys(tokens), lse, values)
        return writer.finish(
            token_ids,
            prompt_tokens=prompt_tokens,
            model="synthetic",
            origin="synthetic",
            seed=seed,
            task={
                "id": f"synthetic-s{seed}",
                "family": "synthetic",
                "truth": planting.truth(),
                "recipe": asdict(recipe),
            },
            vocabulary={token: f"w{token} " for token in np.unique(token_ids).tolist()},
        )
