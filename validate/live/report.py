"""One self-contained HTML page of a live run: what was right, what it took, what predicted it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from simulator.charts.style import ordered_policies, styled
from simulator.results.labels import row_budget
from simulator.results.tables import BUDGET
from simulator.results.terminal import format_bytes
from traces.atomic import write_file
from traces.extras import require_extra
from traces.wording import counted, number, span
from validate.live.accuracy import ALL_FAMILIES, compare
from validate.live.fidelity import Cells, best_metric
from validate.live.terminal import published_text

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 1060px; margin: 2.5em auto;
       padding: 0 1.5em }
h1 { font-size: 1.5em; margin-bottom: 0.2em } h2 { font-size: 1.15em; margin-top: 2.2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin: 0.8em 0 }
th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid #e6e6e6; white-space: nowrap }
th { border-bottom: 1px solid #555; font-weight: 600 } td.text, th.text { text-align: left }
p.note { color: #555; font-size: 13px } svg { max-width: 100%; height: auto } .wide { overflow-x: auto }
"""
# Policies that are set against each other level by level: the layer's share, the head's share, both.
_PAIRS = (("rkv+wave", "rkv"), ("rkv+utility", "rkv"), ("reasonalloc", "rkv"), ("pyramid-rkv", "rkv"))


def write_report(
    path: Path,
    rows: pl.DataFrame,
    accuracy: pl.DataFrame,
    cells: dict[str, Cells] | None,
    fidelity: pl.DataFrame | None,
    note: str = "",
    published: pl.DataFrame | None = None,
    source: str = "",
) -> dict[str, str]:
    """Write the page; give its charts as SVG, by name.

    Parameters
    ----------
    path : Path
    rows : polars.DataFrame
        Of ``completions.ROW_SCHEMA``.
    accuracy : polars.DataFrame
        Of `accuracy_table`.
    cells, fidelity
        Of `matched_cells` and `fidelity_table`; None without simulated rows.
    note : str
        What a reader has to know first.
    published : polars.DataFrame
        Of `beside_published`; None without published numbers.
    source : str
        Where those are from.

    Raises
    ------
    UserError
        If the packages that draw charts are not installed.
    """
    require_extra("a report", "altair", "vl_convert")
    from validate.live import charts

    policies = ordered_policies(rows["policy"].to_list())
    figures = {"accuracy": _svg(charts.accuracy_chart(accuracy, policies))}
    if cells is not None and fidelity is not None:
        best = best_metric(fidelity)
        shown = [best] if best == "mass_mean" else [best, "mass_mean"]
        figures["predictors"] = _svg(charts.ranking_chart(fidelity))
        figures["scatter"] = _svg(charts.scatter_chart(cells, fidelity, shown, policies))
    parts = [
        "<h1>KV budgets under real eviction</h1>",
        *([_paragraph(note)] if note else []),
        _paragraph(_what_ran(rows, accuracy)),
        "<h2>Right answers against budget</h2>",
        _figure(figures["accuracy"]),
        _note(
            "Bars: 95% bootstrap intervals over problems. A budget in percent is of each problem's own "
            "full-cache run."
        ),
    ]
    if cells is not None and fidelity is not None:
        parts += _fidelity_parts(charts.METRIC_NAMES[best], fidelity, figures)
    if published is not None:
        parts += _published_parts(published, source)
    parts += _comparison_parts(rows)
    parts += ["<h2>All policies and budgets</h2>", _accuracy_table(accuracy)]
    body = "\n".join(parts)
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>KV budgets under real eviction</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )
    write_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return figures


def _what_ran(rows: pl.DataFrame, accuracy: pl.DataFrame) -> str:
    evicting = rows.filter(pl.col("budget_asked").is_not_null())
    samples = rows["sample"].n_unique()
    each = "" if samples == 1 else f", {samples} texts each"
    full = accuracy.filter(pl.col("budget_asked").is_null() & (pl.col("family") != ALL_FAMILIES))
    base = ", ".join(
        f"{row['accuracy']:.1%} in {row['family'] or 'all'}" for row in full.iter_rows(named=True)
    )
    return (
        f"{counted(rows['problem'].n_unique(), 'problem')}{each}, {evicting['policy'].n_unique()} policies, "
        f"{evicting.select(BUDGET).n_unique()} budgets: {len(rows):,} texts decoded "
        f"with entries really evicted. The full cache answers {base} right."
    )


def _fidelity_parts(named: str, fidelity: pl.DataFrame, figures: dict[str, str]) -> list[str]:
    best = best_metric(fidelity)
    lines = []
    for row in fidelity.filter(pl.col("metric") == best).iter_rows(named=True):
        lines.append(
            f"{row['family'] or 'problems'}: {number(row['spearman_within'], 2)} within a budget and "
            f"{number(row['spearman'], 2)} over all cells; its winner is {100 * row['regret']:.1f} points "
            "below the best on average, "
            f"{100 * row['regret_most']:.1f} at most"
        )
    return [
        "<h2>How well the simulator predicts this</h2>",
        _paragraph(
            f"Best predictor: {named} (<code>{best}</code>). Spearman correlation with "
            "accuracy, " + "; ".join(lines) + ".",
            raw=True,
        ),
        _figure(figures["predictors"]),
        _figure(figures["scatter"]),
        _fidelity_table(fidelity),
        _note(
            "Within a budget: the mean of the correlations over policies at one budget, which is the "
            "question of a user whose memory is given. Regret: accuracy lost by taking the policy that the "
            "metric puts first. Intervals are bootstrapped over problems and traces at once."
        ),
    ]


def _comparison_parts(rows: pl.DataFrame) -> list[str]:
    held = set(rows["policy"])
    parts = []
    for policy, other in _PAIRS:
        if {policy, other} <= held:
            differences = compare(rows, policy, other).sort("family", "budget_asked")
            parts.append(
                _table(
                    (f"{policy} less {other}", "budget", "problems", "points", "95% interval"),
                    (
                        (
                            row["family"],
                            row_budget(row),
                            row["n_problems"],
                            f"{100 * row['difference']:+.1f}",
                            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
                        )
                        for row in differences.iter_rows(named=True)
                    ),
                )
            )
    return ["<h2>Level by level, at equal budget</h2>", *parts] if parts else []


def _published_parts(published: pl.DataFrame, source: str) -> list[str]:
    marks: dict[str, str] = {}
    table = _table(
        ("benchmark", "policy", "model", "budget", "ours", "95%", "published", "ours - published", "95%"),
        [
            (
                row["benchmark"],
                row["policy"],
                row["model"],
                row_budget(row),
                *published_text(row, marks),
            )
            for row in published.iter_rows(named=True)
        ],
        n_text=3,
    )
    told = [f"Pass@1 in percent; intervals are of our own runs. Published: {source}."]
    told += [f"{mark} {text}." for text, mark in marks.items()]
    return ["<h2>Beside the published numbers</h2>", table, _note(" ".join(told))]


def _accuracy_table(accuracy: pl.DataFrame) -> str:
    order = ["family", "budget_asked", "accuracy"]
    rows = accuracy.sort(order, descending=[False, False, True], nulls_last=False)
    return _table(
        (
            "family",
            "policy",
            "budget",
            "right",
            "95% interval",
            "answered",
            "looping",
            "tokens",
            "diverges at",
            "peak",
        ),
        (
            (
                row["family"],
                row["policy"],
                row_budget(row),
                f"{row['accuracy']:.1%}",
                f"{row['low']:.1%} to {row['high']:.1%}",
                f"{row['answered']:.0%}",
                f"{row['looping']:.0%}",
                f"{row['tokens']:.0f}",
                "-" if row["diverged_at"] is None else f"{row['diverged_at']:.0f}",
                format_bytes(row["bytes_peak"]),
            )
            for row in rows.iter_rows(named=True)
        ),
        n_text=2,
    )


def _fidelity_table(fidelity: pl.DataFrame) -> str:
    def interval(row: dict[str, Any], name: str) -> str:
        interval = span(row[f"{name}_low"], row[f"{name}_high"], 2)
        return number(row[name], 2) + (f" ({interval})" if interval != "-" else "")

    rows = fidelity.sort("family", "spearman_within", descending=[False, True])
    return _table(
        (
            "family",
            "metric",
            "Spearman within",
            "Kendall within",
            "Spearman, all",
            "Kendall, all",
            "regret, points",
            "at most",
        ),
        (
            (
                row["family"],
                row["metric"],
                interval(row, "spearman_within"),
                number(row["kendall_within"], 2),
                interval(row, "spearman"),
                number(row["kendall"], 2),
                f"{100 * row['regret']:.1f}",
                f"{100 * row['regret_most']:.1f}",
            )
            for row in rows.iter_rows(named=True)
        ),
        n_text=2,
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], n_text: int = 1) -> str:
    def line(tag: str, values: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{' class=text' if i < n_text else ''}>{html.escape(str(value))}</{tag}>"
            for i, value in enumerate(values)
        )

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<div class=wide><table><tr>{line('th', head)}</tr>\n{body}</table></div>"


def _svg(chart: Any) -> str:
    import vl_convert

    return vl_convert.vegalite_to_svg(styled(chart).to_dict())


def _figure(svg: str) -> str:
    return f"<div class=wide>{svg}</div>"


def _paragraph(text: str, raw: bool = False) -> str:
    return f"<p>{text if raw else html.escape(text)}</p>"


def _note(text: str) -> str:
    return f"<p class=note>{html.escape(text)}</p>"
