"""Tables of live runs and of replays, from a few numbers."""

from __future__ import annotations

import polars as pl

NOBODY = ("fullkv", "{}", None, None)


def label(policy, budget, unit="%", parameters="{}"):
    return (policy, parameters, float(budget), unit)


def live_rows(solved, family="walk", **columns):
    """Rows of a live run; ``solved`` gives, per cell, whether each problem's samples are right."""
    rows = [
        {
            "family": family,
            "problem": f"{family}-{problem}",
            "sample": sample,
            "policy": policy,
            "policy_params": parameters,
            "budget_asked": budget,
            "budget_unit": unit,
            "budget_kind": None if budget is None else "kept",
            "right": bool(right),
            "answer": "x",
            "ended": True,
            "loop_period": None,
            "n_tokens": 100,
            "diverged_at": None,
            "bytes_peak": 1000,
            "bytes_mean": 500.0,
        }
        | columns
        for (policy, parameters, budget, unit), problems in solved.items()
        for problem, samples in enumerate(problems)
        for sample, right in enumerate(samples if isinstance(samples, list) else [samples])
    ]
    types = {
        "budget_asked": pl.Float64,
        "budget_unit": pl.String,
        "budget_kind": pl.String,
        "loop_period": pl.Int32,
        "diverged_at": pl.Int32,
        "answer": pl.String,
    }
    return pl.DataFrame(rows, schema_overrides=types)


def simulated_rows(values, family="walk", metric="mass_mean", **columns):
    """Rows of a replay; ``values`` gives, per cell, the metric on each trace."""
    rows = [
        {
            "trace_id": f"{family}-{trace}",
            "family": family,
            "status": "ok",
            "policy": policy,
            "policy_params": parameters,
            "budget_asked": budget,
            "budget_unit": unit,
            "budget_kind": None if budget is None else "kept",
            metric: float(value),
        }
        | columns
        for (policy, parameters, budget, unit), own in values.items()
        for trace, value in enumerate(own)
    ]
    return pl.DataFrame(rows, schema_overrides={"family": pl.String})
