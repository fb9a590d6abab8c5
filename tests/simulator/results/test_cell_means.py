"""Means of cells that are stored, and what is chosen by them."""

import polars as pl
import pytest

from simulator.cells import run_replay
from simulator.results.means import cell_means, chosen_elsewhere
from simulator.results.metric_names import METRICS
from simulator.results.output import write_parquet


def test_means_are_over_traces_of_one_family(make_trace):
    traces = [make_trace(task={"family": "walk"}), make_trace(task={"family": "walk"}), make_trace()]
    rows = run_replay(traces, ["rkv:window=4,buffer=4", "random:buffer=4"], [12, 16]).table
    means = cell_means(rows)
    assert len(means) == 8
    assert means.columns[-len(METRICS) :] == list(METRICS)
    assert sorted(set(means.select("family", "n_traces").rows())) == [("", 1), ("walk", 2)]
    own = rows.filter(family="walk", policy="random", budget_asked=12.0)
    found = means.filter(family="walk", policy="random", budget_asked=12.0).row(0, named=True)
    assert found["mass_mean"] == pytest.approx(own["mass_mean"].mean(), abs=1e-6)
    assert found["bytes_mean"] == round(own["bytes_mean"].mean())


def test_command_writes_them_and_refuses_in_one_line(make_trace, tmp_path, run_sim):
    rows = run_replay([make_trace()], ["random:buffer=4"], [12]).table
    write_parquet(rows, tmp_path / "rows.parquet")
    code, _, err = run_sim("results", tmp_path / "rows.parquet", "--means", "-o", tmp_path / "means.csv")
    assert (code, err) == (0, f"sim: wrote {tmp_path / 'means.csv'}: 1 row\n")
    assert pl.read_csv(tmp_path / "means.csv").equals(cell_means(rows))
    for options in (
        ["-o", tmp_path / "none" / "means.csv"],
        [],
        ["--metric", "mass", "-o", tmp_path / "m.csv"],
    ):
        code, out, err = run_sim("results", tmp_path / "rows.parquet", "--means", *options)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1


def table(values, budget=20.0):
    return pl.DataFrame(
        {"policy": list("abc"), "budget_asked": [budget] * 3, "budget_unit": ["%"] * 3}
        | {"lost_lookup_rate": values, "mass_mean": values}
    )


def test_a_winner_is_judged_where_it_was_not_chosen():
    here, there = table([0.1, 0.2, 0.3]), table([0.25, 0.2, 0.4])
    (found,) = chosen_elsewhere(here, there, "lost_lookup_rate").to_dicts()
    assert (found["winner"], found["here"], found["there"], found["place"]) == ("a", 0.1, 0.25, 2)
    assert (found["best_there"], found["could"], found["n_policies"]) == ("b", 0.2, 3)
    assert (found["budget"], found["spearman"]) == ("20%", pytest.approx(0.5))


def test_of_mass_more_is_better():
    found = chosen_elsewhere(table([0.1, 0.2, 0.3]), table([0.1, 0.2, 0.3]), "mass_mean")
    assert found.select("winner", "best_there", "place").row(0) == ("c", "c", 1)


def test_only_budgets_of_both_are_judged():
    here = pl.concat([table([0.1, 0.2, 0.3]), table([0.1, 0.2, 0.3], 40.0)])
    assert chosen_elsewhere(here, table([0.1, 0.2, 0.3]), "mass_mean")["budget"].to_list() == ["20%"]
