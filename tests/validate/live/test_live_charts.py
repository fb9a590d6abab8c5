"""Charts of a live run: of a crowd the leading stand out where one can point, and no number breaks a page."""

import json

import polars as pl
import pytest

pytest.importorskip("altair")
from validate.live.charts import accuracy_chart, accuracy_figures, ranking_figures


def accuracies(n_policies):
    rows = [
        {"policy": f"p{i:02}", "budget_asked": budget, "accuracy": i / 20}
        for budget in (10.0, 20.0)
        for i in range(n_policies)
    ]
    full = {"policy": "fullkv", "budget_asked": None, "accuracy": 0.95}
    budget = {"budget_unit": "%", "budget_kind": "kept"}
    return pl.DataFrame([full | dict.fromkeys(budget), *(row | budget for row in rows)]).with_columns(
        family=pl.lit("walk"), low=pl.col("accuracy") - 0.1, high=pl.col("accuracy") + 0.1
    )


@pytest.mark.parametrize(("n_policies", "faded"), [(4, False), (14, True)])
def test_of_a_crowd_the_leading_stand_out_where_one_can_point(n_policies, faded):
    table, policies = accuracies(n_policies), [f"p{i:02}" for i in range(n_policies)]
    (figure,) = accuracy_figures(table, policies)
    asked = [own["value"] for own in figure.specification()["params"] if "value" in own]
    assert asked == ([[{"policy": f"p{i:02}"} for i in range(13, 5, -1)]] if faded else [])
    picture = accuracy_chart(table, policies).to_dict()
    asked = [own["value"] for own in picture["params"] if "value" in own]
    assert asked == ([[{"policy": name} for name in policies]] if faded else [])


def test_correlations_that_are_not_there_are_left_out():
    names = ("spearman", "spearman_within")
    row = {f"{name}{end}": float("nan") for name in names for end in ("", "_low", "_high")}
    table = pl.DataFrame([row | {"metric": "gap", "family": ""}])
    for figure in ranking_figures(table):
        json.dumps(figure.specification(), allow_nan=False)
