"""The numbers that may tell policies apart: one name each, and how far each can be trusted.

How far is measured on one small model, by decoding with entries really evicted, and on pretrained ones by
the divergence of their predictions: ``fidelity.json`` beside this file, which ``sim reasoner trust`` makes
from the stored tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from traces.errors import UserError
from traces.wording import near


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of a row that may tell policies apart.

    Attributes
    ----------
    column : str
        In rows, and the value of ``--metric``.
    label : str
        In prose, tables and charts.
    more_is_better : bool
    leads : str
        What the policy that this number puts first does.
    unit : str
        ``%`` for a share, ``nats``, or nothing.
    """

    column: str
    label: str
    more_is_better: bool
    leads: str
    unit: str = "%"

    @property
    def is_share(self) -> bool:
        """Whether it is written in percent."""
        return self.unit == "%"

    @property
    def title(self) -> str:
        """Name it on an axis, with its unit."""
        return f"{self.label}, nats" if self.unit == "nats" else self.label

    def written(self, value: float) -> str:
        """Write a value with three digits or so: small shares differ in the second decimal."""
        if not self.is_share:
            return f"{value:.3g}"
        return f"{value:.1%}" if abs(value) >= 0.0995 else f"{value:.2%}"


METRICS = {
    metric.column: metric
    for metric in (
        Metric(
            "lost_lookup_peak", "lost lookups, worst step", False, "loses fewest lookups at the worst step"
        ),
        Metric("lost_lookup_rms", "lost lookups, at once", False, "loses fewest lookups at once"),
        Metric("lost_lookup_rate", "lost lookups", False, "loses fewest lookups"),
        Metric("miss_rate", "strongest key gone", False, "keeps the strongest key most often"),
        Metric("low_mass_rate", "less than half the mass", False, "keeps half the mass most often"),
        Metric("mass_mean", "retained mass, mean", True, "retains most attention"),
        Metric("mass_p05", "retained mass, 5th percentile", True, "retains most at its 5th percentile"),
        Metric("mass_min_head", "retained mass, worst head", True, "retains most in its worst head"),
        Metric("gap", "gap to the oracle", False, "comes closest to the oracle"),
    )
}
# What validation adds to a replay's rows, measured on the model's own predictions.
MEASURED = {
    metric.column: metric
    for metric in (
        Metric("kl_mean", "divergence of predictions, mean", False, "moves predictions least", "nats"),
        Metric(
            "kl_p95",
            "divergence of predictions, 95th percentile",
            False,
            "moves predictions least at its worst",
            "nats",
        ),
        Metric("kl_worst", "divergence of predictions, worst step", False, "moves no prediction far", "nats"),
        Metric("top_changed", "steps with another top token", False, "changes the top token least often"),
        Metric(
            "log_likelihood_change",
            "change of the text's log-likelihood",
            True,
            "keeps the text most likely",
            "nats",
        ),
        Metric("forced_mass", "retained mass under eviction", True, "retains most attention under eviction"),
    )
}
SHIFT = "shift_mean"
# What a replay tells of a trace with sensitivities.
ESTIMATED = {
    metric.column: metric
    for metric in (
        Metric(SHIFT, "shift of predictions", False, "moves predictions least to first order", ""),
        Metric("predicted_kl", "predicted divergence", False, "should move predictions least", "nats"),
    )
}
COMPARED = METRICS | MEASURED | ESTIMATED
# What a search may go by: the gap needs the oracle, which it does without, and a prediction orders policies
# as the shift that it is made from.
SEARCHABLE = (*(name for name in METRICS if name != "gap"), SHIFT)
# Of all of them, taking the policy that it puts first costs the fewest answers, over all that were decoded.
DEFAULT_METRIC = "lost_lookup_peak"
# Which of them a sample of decode steps can tell.
DEFAULT_OF_SAMPLES = "lost_lookup_rate"


def why_missing(metric: str) -> str:
    """Say of which replays a row has no such number."""
    if metric == "predicted_kl":
        return "where no calibration covers model, draws, text and shift"
    return "of traces without sensitivities" if metric in ESTIMATED else "of samples"


def asked_metric(name: str | None) -> str:
    """Return the column asked for by its name or label, the default for None; raises UserError if unknown."""
    if name is None:
        return DEFAULT_METRIC
    found = next((own.column for own in COMPARED.values() if name in (own.column, own.label)), None)
    if found is None:
        raise UserError(f"--metric is '{name}'{near(name, COMPARED)}; allowed: {', '.join(COMPARED)}")
    return found


def fidelity_note(metric: str, models: Iterable[str], policies: Iterable[str] = ()) -> str:
    """Say in one line how far a number can be trusted, for whoever is about to choose a policy by it.

    ``models`` are those of the traces at hand, which may be among those that it was measured on. Of
    ``policies``, those that the number is known to rank too high there are named.
    """
    if metric in MEASURED:
        return f"'{MEASURED[metric].label}' is measured, by sim validate, on the traces' own model."
    label, known = COMPARED[metric].label, _fidelity()
    # Predicted divergence orders policies as the shift that it is made from.
    metric = SHIFT if metric in ESTIMATED else metric
    measured, at_hand = known["metrics"][metric], set(models)
    where = f"{known['model']} ({known['parameters']} parameters)"
    pretrained = known["pretrained"]
    own = {model: pretrained[model] for model in sorted(at_hand & set(pretrained))}
    own = {model: found for model, found in own.items() if metric in found["metrics"]}
    strange = sorted(at_hand - {known["model"], *own})
    ranges = [_span(measured[kind]) for kind in ("chosen", "others")]
    told = (
        f"'{label}' is no recommendation: when decoded with eviction on {where}, it ranked policies within a "
    )
    told += f"budget at {ranges[0]} (Spearman), other policies at {ranges[1]}"
    told += ", on which it was found" if measured["found_on_others"] else ""
    for model, found in own.items():
        span = _span(found["metrics"][metric]["divergence"])
        told += f"; on {model} it ranked {found['policies']} policies by their divergence at {span}"
    told += f"; on {', '.join(strange)} it is unmeasured." if strange else "."
    judged = [found["metrics"][metric] for found in own.values()]
    # Where the model itself was measured, no other speaks for it.
    judged += [measured] if len(own) < len(at_hand) else []
    wrong = [name for each in judged for name in each["misjudged"] if name in set(policies)]
    if wrong:
        told += f" Known to rank too high: {', '.join(dict.fromkeys(wrong))}."
    return told


def _span(ends: list[float]) -> str:
    return "{:.2f} to {:.2f}".format(*ends)


@cache
def _fidelity() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((resources.files("simulator.results") / "fidelity.json").read_bytes())
    return found
