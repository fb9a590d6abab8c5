"""Cells of a replay and of a live run that are the same cell."""

from __future__ import annotations

import polars as pl
import pytest
from live_tables import NOBODY, label, live_rows, simulated_rows

from traces.errors import UserError
from validate.live.fidelity import METRICS, matched_cells


def test_the_same_policy_parameters_and_budget_are_one_cell():
    solved = {
        NOBODY: [1, 1, 1],
        label("rkv", 10): [1, 0, 0],
        label("rkv", 10, parameters='{"alpha": 1}'): [0, 0, 0],
        label("rkv", 10, "entries"): [0, 0, 0],
        label("snapkv", 20): [1, 1, 0],
        label("random", 20): [0, 0, 0],
    }
    values = {
        label("snapkv", 20): [0.3, 0.4],
        label("rkv", 20): [0.9, 0.9],
        label("rkv", 10): [0.1, 0.2],
    }
    live = live_rows(solved).sample(fraction=1.0, shuffle=True, seed=1)
    simulated = simulated_rows(values).reverse()
    (cells,) = matched_cells(simulated, live).values()
    assert sorted(cells.labels) == [(*label("rkv", 10), "kept"), (*label("snapkv", 20), "kept")]
    first = cells.labels.index((*label("rkv", 10), "kept"))
    assert cells.solved[first].tolist() == [1, 0, 0]
    assert cells.solved[1 - first].tolist() == [1, 1, 0]
    assert cells.simulated["mass_mean"][first].tolist() == [0.1, 0.2]
    assert cells.simulated["mass_mean"][1 - first].tolist() == [0.3, 0.4]
    assert list(cells.simulated) == ["mass_mean"]
    assert [budget.tolist() for budget in cells.budgets] == [[0], [1]]


def test_of_several_samples_the_share_is_taken():
    rows = live_rows({label("rkv", 10): [[1, 0], [1, 1], [0, 0]]})
    (cells,) = matched_cells(simulated_rows({label("rkv", 10): [0.5]}), rows).values()
    assert cells.solved.tolist() == [[0.5, 1, 0]]


@pytest.mark.parametrize(
    ("metric", "more_is_better"), [(own.column, own.more_is_better) for own in METRICS.values()]
)
def test_of_every_metric_more_predicts_better(metric, more_is_better):
    simulated = simulated_rows({label("rkv", 10): [0.25, 0.5]}, metric=metric)
    (cells,) = matched_cells(simulated, live_rows({label("rkv", 10): [1]})).values()
    sign = 1 if more_is_better else -1
    assert cells.simulated[metric].tolist() == [[0.25 * sign, 0.5 * sign]]


def test_families_are_matched_with_their_own():
    live = [
        live_rows({label("rkv", 10): [1, i]}, family) for i, family in enumerate(("walk", "machine", "code"))
    ]
    simulated = [
        simulated_rows({label("rkv", 10): [i]}, family) for i, family in enumerate(("machine", "walk"))
    ]
    cells = matched_cells(pl.concat(simulated), pl.concat(live))
    assert {family: own.solved.tolist() for family, own in cells.items()} == {
        "machine": [[1, 1]],
        "walk": [[1, 0]],
    }
    assert cells["walk"].simulated["mass_mean"].tolist() == [[1]]


def test_problems_without_a_family_are_matched():
    # A live run calls it empty; a trace has none.
    cells = matched_cells(
        simulated_rows({label("rkv", 10): [0.5]}, None), live_rows({label("rkv", 10): [1]}, "")
    )
    assert list(cells) == [""]


def test_only_problems_and_traces_of_all_cells_count():
    live = live_rows({label("rkv", 10): [1, 0, 1], label("snapkv", 10): [0, 1]})
    simulated = pl.concat(
        [
            simulated_rows({label("rkv", 10): [0.1, 0.2, 0.3]}),
            simulated_rows({label("snapkv", 10): [0.5]}),
            simulated_rows({label("snapkv", 10): [0, 0.6]}, status="error").slice(1),
        ]
    )
    (cells,) = matched_cells(simulated, live).values()
    assert cells.solved.tolist() == [[1, 0], [0, 1]]
    assert cells.simulated["mass_mean"].tolist() == [[0.1], [0.5]]


@pytest.mark.parametrize(
    ("solved", "values", "status"),
    [
        (label("rkv", 10), label("rkv", 20), "ok"),
        (label("rkv", 10), label("snapkv", 10), "ok"),
        (label("rkv", 10), label("rkv", 10, "entries"), "ok"),
        (label("rkv", 10), label("rkv", 10, parameters="{1}"), "ok"),
        (label("rkv", 10), label("rkv", 10), "error"),
        (NOBODY, label("fullkv", 10), "ok"),
    ],
)
def test_nothing_in_common_is_refused(solved, values, status):
    with pytest.raises(UserError, match="no family, policy and budget is in both"):
        matched_cells(simulated_rows({values: [0.5]}, status=status), live_rows({solved: [1]}))


def test_cells_that_share_no_problem_or_no_trace_are_refused():
    cells = [label("rkv", 10), label("snapkv", 10)]
    apart = pl.concat([live_rows({cells[0]: [1]}), live_rows({cells[1]: [1]}, problem="another")])
    simulated = pl.concat(
        [simulated_rows({cells[0]: [1]}), simulated_rows({cells[1]: [1]}, trace_id="another")]
    )
    together = simulated_rows({key: [1] for key in cells}), live_rows({key: [1] for key in cells})
    for pair in ((together[0], apart), (simulated, together[1])):
        with pytest.raises(UserError, match="in both"):
            matched_cells(*pair)
