"""The stored tables of the reference reasoner agree with each other."""

import subprocess
import sys

import pytest

from simulator.results.metric_names import METRICS, SHIFT
from traces.errors import UserError
from validate.live.fidelity import rank
from validate.reasoner.tables import cells_of, choices, differences, judged_rows, result_table, stored_profile


@pytest.mark.parametrize(("others", "n_cells"), [(False, 54), (True, 32)])
def test_stored_means_give_the_stored_correlations(others, n_cells):
    judged = judged_rows(others)
    fidelity = result_table("fidelity-others" if others else "fidelity")
    cells = cells_of(judged)
    assert list(cells) == ["machine", "program", "walk"]
    for family, own in cells.items():
        assert len(own.labels) == n_cells
        assert set(own.simulated) == {*METRICS, SHIFT}
        for metric in METRICS:
            values = own.simulated[metric]
            found = rank(values.mean(1), own.solved.mean(1), own.budgets)
            stored = fidelity.filter(family=family, metric=metric).row(0, named=True)
            assert found.spearman == pytest.approx(stored["spearman"], abs=1e-6)
            assert found.spearman_within == pytest.approx(stored["spearman_within"], abs=1e-6)
            # And by what the number chooses at each budget; those at which none answers choose nothing.
            chosen = choices(judged.filter(family=family), metric).filter(could=0.0)
            assert chosen.is_empty() or chosen["regret"].max() == 0
            assert found.regret == pytest.approx(stored["regret"], abs=1e-9)


def test_a_choice_costs_what_the_best_has_more():
    judged = judged_rows().filter(family="walk")
    found = choices(judged, "mass_mean")
    assert found["budget"].to_list() == ["10%", "15%", "20%", "30%", "40%", "50%"]
    row = found.filter(budget="20%").row(0, named=True)
    own = judged.filter(budget="20%")
    assert row["could"] == own["accuracy"].max()
    assert row["chosen"] == own.sort("mass_mean")["policy"][-1]
    assert row["regret"] == pytest.approx(row["could"] - row["gets"])


def test_differences_are_in_points_and_over_families():
    judged = judged_rows()
    found = differences(judged, "rkv", ["accuracy"])
    assert "rkv" not in found["policy"].to_list()
    assert found["budget"].to_list()[:6] == ["10%", "15%", "20%", "30%", "40%", "50%"]
    at = judged.filter(budget="20%")
    means = {name: at.filter(policy=name)["accuracy"].mean() for name in ("rkv", "reasonalloc")}
    own = found.filter(policy="reasonalloc", budget="20%")["accuracy"].item()
    assert own == pytest.approx(100 * (means["reasonalloc"] - means["rkv"]))


def test_the_grid_has_every_number():
    grid = result_table("simulated-grid")
    assert len(grid) == 72
    assert grid.select(list(METRICS)).null_count().sum_horizontal().item() == 0
    assert grid["n_traces"].unique().to_list() == [10]


def test_what_is_not_there_is_refused():
    with pytest.raises(UserError, match="table is 'acuracy'; allowed: accuracy, "):
        result_table("acuracy")
    with pytest.raises(UserError, match="metric is 'mass'"):
        choices(judged_rows(), "mass")


def test_the_profile_is_of_the_model_of_the_tables():
    assert set(stored_profile()["demand"]) == set(judged_rows()["family"])


@pytest.mark.slow
def test_reading_loads_no_model_library():
    code = "import sys, validate.reasoner.tables, validate.live.charts, validate.reasoner.profile; "
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
