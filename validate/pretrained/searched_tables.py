"""Tables of what a search for the smallest shift found, measured where it had not looked, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import polars as pl

from simulator.policies.language import parse_policy
from simulator.results.layout import markdown_table
from simulator.results.tables import bootstrap
from traces.documents import read_json
from validate.live.accuracy import mean_interval
from validate.pretrained.stored import HOME, evicting_rows, graded_rows

_MODEL = "qwen2.5-coder-0.5b"
_BASES = ("rkv", "reasonalloc")


def _found() -> Iterator[dict[str, object]]:
    """Give the policies that the search judged on its held-out texts, and the published ones beside them."""
    where = HOME / "results" / f"winners-{_MODEL}.json"
    told: list[dict[str, object]] = read_json(where, str(where), list[dict[str, object]])
    return (own for own in told if own["role"] != "base" and own["policy"] != told[0]["policy"])


def _rows_of(own: dict[str, object], rows: pl.DataFrame) -> pl.DataFrame:
    policy = parse_policy(str(own["policy"]))
    of_policy = {"policy": policy.name, "policy_params": policy.parameters_json}
    return rows.filter(budget=own["budget"], **of_policy)


def _differences(rows: pl.DataFrame, bases: dict[str, pl.DataFrame], rng: np.random.Generator) -> list[str]:
    """Tell the mean divergence, and what it is less each base's on the same texts, with intervals."""
    told = [f"{rows['kl_mean'].to_numpy().mean():.3f}"]
    for name in _BASES:
        base = bases[name].filter(budget=rows["budget"][0], policy=name).select("trace", base="kl_mean")
        both = rows.join(base, on="trace")
        difference = (both["kl_mean"] - both["base"]).to_numpy()
        low, high = bootstrap(difference, rng, 2000)
        told.append(f"{difference.mean():+.3f} ({low:+.3f} to {high:+.3f})")
    return told


def _searched() -> str:
    """Tell what the winners' shift was, and what was measured on other texts."""
    rng = np.random.default_rng(0)
    measured, forced = evicting_rows("searched", _MODEL), evicting_rows("searched-forced", _MODEL)
    known = evicting_rows("masked", _MODEL).filter(
        pl.col("trace").is_in(measured["trace"].unique().to_list())
    )
    table = []
    for own in _found():
        line = [str(own["budget"]), str(own["role"]), f"`{own['policy']}`", f"{own['held_out']:.3f}"]
        line += _differences(_rows_of(own, measured), {"rkv": known, "reasonalloc": measured}, rng)
        table.append(line + _differences(_rows_of(own, forced), dict.fromkeys(_BASES, forced), rng))
    less = ["less R-KV's", "less ReasonAlloc's"]
    shifted = f"shift, {next(_found())['n_traces']} texts"
    head = ["budget", "", "policy", shifted, f"masked, {measured['trace'].n_unique()} texts", *less]
    return markdown_table([*head, f"forced, {forced['trace'].n_unique()} texts", *less], table)


def _searched_right() -> str:
    """Tell the winners' right answers, beside those of R-KV to the same problems."""
    rng = np.random.default_rng(0)
    found, known = graded_rows(_MODEL, "searched-graded"), graded_rows(_MODEL)
    rkv, full = known.filter(policy="rkv"), known.filter(pl.col("budget_asked").is_null())
    again = found.filter(pl.col("budget_asked").is_null())
    table = [["full cache, here and there", f"{_percent(again)} and {_percent(full)}", ""]]
    table.append(["`rkv`, there", _percent(rkv), ""])
    for (policy, params), own in found.filter(pl.col("budget_asked").is_not_null()).group_by(
        "policy", "policy_params", maintain_order=True
    ):
        both = own.join(rkv.select("problem", other="right"), on="problem")
        difference = (both["right"].cast(pl.Int8) - both["other"].cast(pl.Int8)).to_numpy()
        values = (difference.mean(), *mean_interval(difference, rng, lowest=-1.0))
        names = {
            parse_policy(str(each["policy"])).parameters_json: str(each["policy"])
            for each in _found()
            if parse_policy(str(each["policy"])).name == policy
        }
        less = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in values))
        table.append([f"`{names[params]}`", _percent(own), less])
    return markdown_table([f"of {len(again)} problems", "right, %", "less R-KV's, points"], table)


def _percent(rows: pl.DataFrame) -> str:
    return f"{100 * rows['right'].cast(pl.Int8).to_numpy().mean():.1f}"


SEARCHED: dict[str, Callable[[], str]] = {
    "pretrained-searched": _searched,
    "pretrained-searched-right": _searched_right,
}
