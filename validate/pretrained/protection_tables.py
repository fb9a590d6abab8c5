"""Tables of what protection is worth, whatever the scorer, and of later scorers, in Markdown."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from simulator.policies.language import parse_policy
from simulator.results.layout import markdown_table
from simulator.results.tables import bootstrap
from validate.pretrained.stored import stored_rows

_MODEL = "qwen2.5-coder-0.5b"
_SCORERS = ("random", "rkv", "snapkv", "h2o")
_PROTECTIONS = ("none", "recent:8", "sinks:4+recent:8", "prompt+recent:64", "boundary:10%")
_LATER = ("gkv", "vase", "random-unified", "random")


def _rows() -> pl.DataFrame:
    """Give the rows on texts that all policies could be run on, with what each protects."""
    rows = stored_rows("protected", _MODEL)
    # By the text: traces of one text with and without values have ids of their own.
    of_text = rows.group_by("trace").len().filter(pl.col("len") == pl.col("len").max())
    rows = rows.join(of_text.select("trace"), on="trace")
    told = [
        str(parse_policy(f"{policy}:protect={own}" if own else policy).protection)
        for policy, own in zip(
            rows["policy"], rows["policy_params"].str.json_path_match("$.protect"), strict=True
        )
    ]
    return rows.with_columns(protect=pl.Series(told, dtype=pl.String))


def _less(rows: pl.DataFrame, base: pl.DataFrame, rng: np.random.Generator) -> tuple[float, float, float]:
    both = rows.join(base.select("trace", base="kl_mean"), on="trace")
    difference = (both["kl_mean"] - both["base"]).to_numpy()
    return float(difference.mean()), *bootstrap(difference, rng, 2000)


def _protected() -> str:
    """Tell the divergence of every scorer under every protection; bold where it is told apart from none's."""
    rows, rng = _rows(), np.random.default_rng(0)
    table = []
    for scorer in _SCORERS:
        own = rows.filter(policy=scorer)
        base, line = own.filter(protect="none"), [f"`{scorer}`"]
        for protect in _PROTECTIONS:
            found = own.filter(protect=protect)
            if found.is_empty():
                line.append("")
                continue
            mean = f"{found['kl_mean'].to_numpy().mean():.3f}"
            _, low, high = _less(found, base, rng)
            line.append(f"**{mean}**" if low > 0 or high < 0 else mean)
        table.append(line)
    head = [f"scorer, {rows['trace'].n_unique()} texts", *(f"`{own}`" for own in _PROTECTIONS)]
    return markdown_table(head, table)


def _later() -> str:
    """Tell the divergence of later scorers, and what it is less R-KV's on the same texts."""
    rows, rng = _rows(), np.random.default_rng(0)
    rkv = rows.filter(policy="rkv", protect="recent:8")
    table = [["`rkv`", "`recent:8`", f"{rkv['kl_mean'].to_numpy().mean():.3f}", ""]]
    for name in _LATER:
        own = rows.filter(policy=name, protect=str(parse_policy(name).protection))
        less = "{:+.3f} ({:+.3f} to {:+.3f})".format(*_less(own, rkv, rng))
        table.append([f"`{name}`", f"`{own['protect'][0]}`", f"{own['kl_mean'].to_numpy().mean():.3f}", less])
    return markdown_table(["policy", "protects", "divergence", "less R-KV's"], table)


PROTECTED: dict[str, Callable[[], str]] = {"protection": _protected, "later-scorers": _later}
