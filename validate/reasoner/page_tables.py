"""The tables of the pages, in Markdown, each made from tables that ship with the reference reasoner."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from importlib import resources
from io import StringIO

import polars as pl
from rich.console import Console

from simulator.policies.language import parse_policy
from simulator.policies.wave import known_waves
from simulator.results.labels import with_budget_label
from simulator.results.layout import markdown_table
from simulator.results.metric_names import COMPARED, SHIFT
from simulator.results.terminal import print_standings
from traces.documents import parse_json, read_toml
from validate.live.accuracy import ALL_FAMILIES
from validate.live.fidelity import LIVE_HALF, rank
from validate.problems.families import FAMILIES
from validate.reasoner.tables import MODEL, cells_of, judged_rows, result_table, stored_document

_LABELS = {name: own.label for name, own in COMPARED.items()} | {LIVE_HALF: "*half of the problems, decoded*"}
_LEVELS = {
    "rkv+wave": "layers only (`rkv+wave`)",
    "rkv+utility": "heads only (`rkv+utility`)",
    "reasonalloc": "both (`reasonalloc`)",
}


def _span(values: Iterable[float], digits: int = 2) -> str:
    values = list(values)
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def _ranked(fidelity: pl.DataFrame) -> list[str]:
    """Return the metrics by their mean correlation within a budget, the best first."""
    means = fidelity.group_by("metric", maintain_order=True).agg(pl.col("spearman_within").mean())
    ranked: list[str] = means.sort("spearman_within", descending=True)["metric"].to_list()
    return [name for name in ranked if name != LIVE_HALF] + [LIVE_HALF]


def _predictors() -> str:
    """Set five numbers side by side: on the policies they were chosen on and on others."""
    tables = [result_table("fidelity"), result_table("fidelity-others")]
    rows = []
    for metric in ("lost_lookup_rate", "lost_lookup_rms", "lost_lookup_peak", "mass_mean", LIVE_HALF):
        row = [_LABELS[metric]]
        for own in (table.filter(metric=metric) for table in tables):
            row += [_span(own["spearman_within"]), _span(100 * own["regret"], 1)]
        rows.append(row)
    head = ["the replay's number", "9 policies: correlation", "points lost"]
    return markdown_table([*head, "8 others: correlation", "points lost"], rows)


def _shifts() -> str:
    """Set the shift of predictions beside other numbers: correlation with accuracy and points lost."""
    first, others = judged_rows(), judged_rows(others=True)
    shared = set(first["budget"]) & set(others["budget"])
    together = pl.concat([first, others], how="diagonal").filter(pl.col("budget").is_in(list(shared)))
    found = [cells_of(rows) for rows in (first, others, together)]
    table = []
    for metric in (SHIFT, "lost_lookup_peak", "lost_lookup_rms", "lost_lookup_rate", "mass_mean"):
        row = [COMPARED[metric].label]
        for families in found:
            ranked = [
                rank(own.simulated[metric][:, 0], own.solved[:, 0], own.budgets) for own in families.values()
            ]
            row += [
                _span(own.spearman_within for own in ranked),
                _span((100 * own.regret for own in ranked), 1),
            ]
        table.append(row)
    head = ["the replay's number", "9 policies: correlation", "points lost"]
    head += ["8 others: correlation", "points lost", "all 17: correlation", "points lost"]
    return markdown_table(head, table)


def _fidelity(table: str) -> str:
    """Set every number's correlation with accuracy and its regret side by side, per family."""
    fidelity = result_table(table)
    head = ["the replay's number"]
    for family in FAMILIES:
        head += [f"{family}: within a budget", "all cells", "regret"]
    rows = []
    for metric in _ranked(fidelity):
        row = [_LABELS[metric]]
        for family in FAMILIES:
            own = fidelity.filter(metric=metric, family=family).row(0, named=True)
            row += [f"{own['spearman_within']:.2f}", f"{own['spearman']:.2f}", f"{100 * own['regret']:.1f}"]
        rows.append(row)
    return markdown_table(head, rows)


def _trust() -> str:
    """Tell what ``sim`` says of each number wherever that number puts a policy first."""
    text = (resources.files("simulator.results") / "fidelity.json").read_bytes()
    known = parse_json(text, "fidelity.json")["metrics"]
    rows = []
    for metric, own in known.items():
        wrong = ", ".join(f"`{policy}`" for policy in own["misjudged"]) or "-"
        rows.append([f"`{metric}`", _LABELS[metric], _span(own["chosen"]), _span(own["others"]), wrong])
    return markdown_table(("`--metric`", "in tables", "9 policies", "8 others", "ranks too high"), rows)


def _evicting(table: str) -> pl.DataFrame:
    return with_budget_label(result_table(table).filter(pl.col("budget_asked").is_not_null()))


def _live() -> str:
    """Tell right answers in percent, per policy, family and budget."""
    in_order = pl.col("family").cast(pl.Enum(list(FAMILIES)))
    accuracy = _evicting("accuracy").filter(pl.col("family") != ALL_FAMILIES)
    accuracy = accuracy.sort(in_order, "budget_asked", maintain_order=True)
    columns = accuracy.select("family", "budget").unique(maintain_order=True).rows()
    head = [f"{family} {budget}" if budget == columns[0][1] else budget for family, budget in columns]
    shares = accuracy.pivot(["family", "budget"], index="policy", values="accuracy", maintain_order=True)
    rows = [[policy, *(f"{100 * share:.0f}" for share in own)] for policy, *own in shares.iter_rows()]
    return markdown_table(["right, %", *head], rows)


def _policy_label(policy: str, params: str) -> str:
    """Return a policy's name with the parameters that are not its defaults, but for the buffer."""
    usual, given = parse_policy(policy).parameters, json.loads(params)
    own = [f"{key}={value}" for key, value in given.items() if usual.get(key) != value and key != "buffer"]
    return policy + (":" + ",".join(own) if own else "")


def _others_live() -> str:
    """Tell right answers of the policies that no number was chosen on, beside two that it was."""
    key, budgets = ("policy", "policy_params"), ("15%", "20%", "30%", "50%")
    base = _evicting("accuracy").filter(pl.col("policy").is_in(["rkv", "reasonalloc"]))
    live = pl.concat(
        own.filter(family=ALL_FAMILIES).select(*key, "budget", "accuracy")
        for own in (base, _evicting("accuracy-others"))
    ).pivot("budget", index=key, values="accuracy", maintain_order=True)
    lost = pl.concat(
        with_budget_label(result_table(name)).select(*key, "budget", "lost_lookup_rate", "lost_lookup_peak")
        for name in ("simulated", "simulated-others")
    ).filter(budget="20%")
    means = lost.group_by(key).agg(pl.col("lost_lookup_rate", "lost_lookup_peak").mean() * 100)
    table = live.join(means, on=key, maintain_order="left")
    ranked = table.sort(pl.sum_horizontal(budgets), descending=True, maintain_order=True)
    rows = [
        [_policy_label(own["policy"], own["policy_params"])]
        + [f"{100 * own[budget]:.0f}" for budget in budgets]
        + [f"{own['lost_lookup_rate']:.2f}", f"{own['lost_lookup_peak']:.0f}"]
        for own in ranked.iter_rows(named=True)
    ]
    head = ("right, % of 256 (`rkv`, `reasonalloc`: of 768)", *budgets)
    return markdown_table((*head, "lost lookups at 20%, %", "worst step at 20%, %"), rows)


def _levels() -> str:
    """Tell what each of ReasonAlloc's levels changes against uniform R-KV, in points."""
    levels = with_budget_label(result_table("levels"))
    budgets = levels["budget"].unique(maintain_order=True).to_list()
    rows = [
        [label]
        + [
            f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
            for row in levels.filter(policy=policy).iter_rows(named=True)
        ]
        for policy, label in _LEVELS.items()
    ]
    return markdown_table(["less R-KV, points", *budgets], rows)


def _levels_published() -> str:
    """Tell the same as the paper reports it, R1-Llama-8B on AIME 2024."""
    place = resources.files("validate") / "configs" / "reasonalloc_paper.toml"
    with resources.as_file(place) as path:
        published = read_toml(path, path.name)["published"]
    told = {
        str(own["budget"]): own["accuracy"]
        for own in published
        if own["model"] == "R1-Llama-8B" and own["benchmark"] == "aime-2024" and "rkv" in own["accuracy"]
    }
    rows = [
        [label, *(f"{own[policy] - own['rkv']:+.1f}" for own in told.values())]
        for policy, label in _LEVELS.items()
    ]
    return markdown_table(["less R-KV, points", *told], rows)


def _winners() -> str:
    """Tell right answers of what a search found, beside policies that it did not find."""
    live = _evicting("accuracy-winners").filter(family=ALL_FAMILIES)
    roles = {
        (parse_policy(own["policy"]).parameters_json, own["budget"]): own["role"]
        for own in stored_document("results/winners.json")
    }
    labels = {
        "winner": "winner of the search",
        "runner-up": "runners-up",
        "base": "`reasonalloc`, the policy to beat",
    }
    found: dict[str, dict[str, list[str]]] = {}
    for row in live.sort("accuracy", descending=True, maintain_order=True).iter_rows(named=True):
        role = roles.get((row["policy_params"], row["budget"]), "")
        share, low, high = (f"{100 * row[name]:.0f}" for name in ("accuracy", "low", "high"))
        label = labels.get(role, f"`{row['policy']}`")
        told = share if role == "runner-up" else f"{share} ({low} to {high})"
        found.setdefault(label, {}).setdefault(row["budget"], []).append(told)
    budgets = sorted({budget for own in found.values() for budget in own})
    order = sorted(found, key=lambda label: label != labels["winner"])
    rows = [[label, *(", ".join(found[label].get(budget, ["-"])) for budget in budgets)] for label in order]
    return markdown_table(["right answers, %", *budgets], rows)


def _standings(metric: str) -> str:
    """Rank every policy by one number, as ``sim results --metric ... --format markdown`` does."""
    text = StringIO()
    console = Console(file=text, width=200)
    print_standings(result_table(f"standings-{metric}"), metric, [MODEL], console, as_markdown=True)
    lines = [line for line in text.getvalue().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return markdown_table(cells[0], cells[2:])


def _card_accuracy() -> str:
    """Tell right answers with a full cache, in both types."""
    types = ("float32", "bfloat16")
    found = [stored_document(f"weights/accuracy-{name}.json") for name in types]
    rows = [
        [own[0]["family"]]
        + [f"{x['right']}/{x['problems']} ({x['low']:.1%} to {x['high']:.1%})" for x in own]
        for own in zip(*found, strict=True)
    ]
    return markdown_table(("family", *types), rows)


def _card_wave() -> str:
    """Tell the entries that each layer and KV head needs."""
    wave = known_waves()[MODEL]
    widest = max(wave.demand)
    rows = [
        [str(layer), f"{demand:.1f}", f"`{'#' * round(20 * demand / widest)}`"]
        + [f"{value:.1f}" for value in wave.head_demand[layer]]
        for layer, demand in enumerate(wave.demand)
    ]
    heads = [f"head {head}" for head in range(len(wave.head_demand[0]))]
    return markdown_table(["layer", "entries", "", *heads], rows)


TABLES: dict[str, Callable[[], str]] = {
    "predictors": _predictors,
    "reasoner-shift": _shifts,
    "fidelity": partial(_fidelity, "fidelity"),
    "fidelity-others": partial(_fidelity, "fidelity-others"),
    "trust": _trust,
    "live": _live,
    "others-live": _others_live,
    "levels": _levels,
    "levels-published": _levels_published,
    "winners": _winners,
    "standings-lost-lookup-peak": partial(_standings, "lost_lookup_peak"),
    "standings-lost-lookup-rate": partial(_standings, "lost_lookup_rate"),
    "standings-mass-mean": partial(_standings, "mass_mean"),
    "card-accuracy": _card_accuracy,
    "card-wave": _card_wave,
}
