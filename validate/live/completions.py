"""Decode one batch of problems under one policy and budget, and say what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from simulator.budget import Budget
from simulator.engine.cap import entries_of, under_budget
from simulator.policies.language import Policy
from simulator.policies.wave import Wave
from simulator.results.tables import budget_columns
from traces.shape import ModelShape
from validate.eviction.decode import Completion, decode
from validate.live.accuracy import CELL_SCHEMA
from validate.models.load import LoadedModel, model_shape, stop_token_ids
from validate.models.next_token import Sampling
from validate.models.vocabulary import whole_vocabulary
from validate.problems.grading import first_divergence, grade, loop_period
from validate.problems.prompts import Prompt, encode_prompt

ROW_SCHEMA: dict[str, Any] = {
    "problem": pl.String,
    "family": pl.String,
    "sample": pl.Int32,
    **CELL_SCHEMA,
    "budget_entries": pl.Int32,
    "right": pl.Boolean,
    "answer": pl.String,
    "expected": pl.String,
    "ended": pl.Boolean,
    "prompt_tokens": pl.Int32,
    "n_tokens": pl.Int32,
    "loop_period": pl.Int32,
    "diverged_at": pl.Int32,
    "bytes_peak": pl.Int64,
    "bytes_mean": pl.Float64,
    "token_ids": pl.List(pl.Int32),
}


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the full cache wrote for one problem and sample: its tokens, and whether it ended by itself."""

    token_ids: list[int]
    ended: bool

    @property
    def n_tokens(self) -> int:
        """Count its tokens with the one that ended it, which is part of its history, as in a trace."""
        return len(self.token_ids) + self.ended


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """How problems are decoded.

    Attributes
    ----------
    max_new_tokens : int
        Of the full-cache run.
    stretch : float or None
        Under eviction a text may be so many times as long as its full-cache run: a derailed one may go on
        for ever. None gives it ``max_new_tokens``, as the full cache has.
    samples : int
        Texts per problem; more than one need a temperature.
    sampling : Sampling
    use_chat_template : bool
    seed : int
        Of the policies that draw at random; each problem has its own stream.
    """

    max_new_tokens: int = 1024
    stretch: float | None = 1.1
    samples: int = 1
    sampling: Sampling = Sampling()  # noqa: RUF009 (frozen)
    use_chat_template: bool = True
    seed: int = 0


def complete(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    policy: Policy,
    budget: Budget | None,
    settings: LiveSettings,
    *,
    first: int = 0,
    baselines: dict[tuple[str, int], Baseline] | None = None,
    waves: dict[str, Wave] | None = None,
) -> pl.DataFrame:
    """Decode problems under a policy, or without ``budget`` with the full cache.

    Parameters
    ----------
    loaded : LoadedModel
    prompts : sequence of Prompt
        With answers; decoded as one batch, ``settings.samples`` times each.
    policy : Policy
    budget : Budget or None
    settings : LiveSettings
    first : int
        Number of the first prompt among all, for its random streams.
    baselines : dict, optional
        Full-cache runs by problem and sample; needed with a budget, since shares and lengths are theirs.
    waves : dict, optional
        Known demand profiles by model.

    Returns
    -------
    polars.DataFrame
        One row per problem and sample, columns of ``ROW_SCHEMA``.
    """
    shape = model_shape(loaded.model.config, loaded.model.dtype)
    baselines = baselines or {}
    texts = [
        encode_prompt(loaded.tokenizer, own.text, settings.use_chat_template, own.system) for own in prompts
    ]
    keys = [(prompt, sample) for prompt in prompts for sample in range(settings.samples)]
    encoded = [text for text in texts for _ in range(settings.samples)]
    known = [] if budget is None else [baselines[prompt.id, sample] for prompt, sample in keys]
    entries, limits = _entries_and_limits(shape, encoded, policy, budget, known, settings)
    streams = range(first * settings.samples, first * settings.samples + len(keys))
    sampling = settings.sampling
    asked = policy if budget is None else under_budget(policy, budget)
    completions = decode(
        loaded.model,
        encoded,
        asked.resolved(whole_vocabulary(loaded.tokenizer)) if asked.trigger.reads_text else asked,
        entries,
        limits,
        stop_ids=stop_token_ids(loaded.model, loaded.tokenizer),
        sampling=[replace(sampling, seed=sampling.seed + stream) for stream in streams],
        name=loaded.name,
        revision=loaded.revision,
        waves=waves,
        seeds=[settings.seed + stream for stream in streams],
    )
    rows = []
    for (prompt, sample), own, n_entries, done in zip(keys, encoded, entries, completions, strict=True):
        (text,) = loaded.tokenizer.batch_decode([done.token_ids], skip_special_tokens=True)
        graded = grade(text, prompt.family, prompt.answer or "")
        baseline = baselines.get((prompt.id, sample))
        rows.append(
            {
                "problem": prompt.id,
                "family": prompt.family or "",
                "sample": sample,
                "policy": policy.name,
                "policy_params": policy.parameters_json,
                **budget_columns(budget),
                "budget_entries": None if budget is None else n_entries,
                "right": graded.right,
                "answer": graded.answer,
                "expected": prompt.answer,
                "ended": done.ended,
                "prompt_tokens": len(own),
                "n_tokens": len(done.token_ids),
                "loop_period": loop_period(done.token_ids),
                "diverged_at": baseline and _divergence(done, baseline),
                "bytes_peak": done.bytes_peak,
                "bytes_mean": done.bytes_mean,
                "token_ids": done.token_ids,
            }
        )
    return pl.DataFrame(rows, schema=ROW_SCHEMA)


def _entries_and_limits(
    shape: ModelShape,
    prompts: Sequence[Sequence[int]],
    policy: Policy,
    budget: Budget | None,
    baselines: Sequence[Baseline],
    settings: LiveSettings,
) -> tuple[list[int], list[int]]:
    """Give each text's budget in entries and its limit in tokens; ``baselines`` are there with a budget."""
    if budget is None:
        return [1] * len(prompts), [settings.max_new_tokens] * len(prompts)
    limits = [
        settings.max_new_tokens if settings.stretch is None else max(1, int(own.n_tokens * settings.stretch))
        for own in baselines
    ]
    entries = [
        entries_of(budget, policy, shape, len(own), len(own) + full.n_tokens, longest=len(own) + limit)
        for own, full, limit in zip(prompts, baselines, limits, strict=True)
    ]
    return entries, limits


def _divergence(done: Completion, baseline: Baseline) -> int | None:
    step = first_divergence(done.token_ids, baseline.token_ids)
    # Where one text was cut off, the other goes on; that is no difference.
    was_cut = any(step == len(own.token_ids) and not own.ended for own in (done, baseline))
    return None if was_cut else step


def baselines_of(table: pl.DataFrame) -> dict[tuple[str, int], Baseline]:
    """Read full-cache runs back from their rows."""
    columns = ("problem", "sample", "token_ids", "ended")
    return {
        (problem, sample): Baseline(token_ids, ended)
        for problem, sample, token_ids, ended in table.select(columns).iter_rows()
    }
