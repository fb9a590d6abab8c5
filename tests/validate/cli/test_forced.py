"""``sim validate forced``: masses with entries really gone, and what both levels refuse alike."""

from __future__ import annotations

import json
import re

import polars as pl
import pytest
from spies import NAME
from verb_runs import one_line

from simulator.policies.language import parse_policy
from simulator.results.tables import GROUP
from validate.levels.runs import run_forced
from validate.models.load import load_model


def test_the_forced_level_gives_masses_and_agreement(level, folder, trace, tmp_path):
    code, out, err = level(
        "forced", "-p", "rkv,random", "--format", "csv", "--steps", tmp_path / "steps.parquet", "--seed", 2
    )
    assert (code, err) == (0, f"sim: wrote {tmp_path / 'steps.parquet'}: 120 rows\n")
    model = load_model(str(folder / NAME), "float32", "cpu").model
    forced = run_forced(model, trace, parse_policy("rkv", buffer=6), 20)
    row, drawn = pl.read_csv(out.encode()).iter_rows(named=True)
    random = [run_forced(model, trace, parse_policy("random", buffer=6), 20, seed=seed) for seed in (2, 0)]
    assert drawn["forced_mass"] == pytest.approx(random[0].forced.mean(), abs=1e-6)
    assert drawn["forced_mass"] != pytest.approx(random[1].forced.mean(), abs=1e-6)
    assert row["forced_mass"] == pytest.approx(forced.forced.mean(), abs=1e-6)
    assert row["mass_mean"] == pytest.approx(forced.simulated.mean(), abs=1e-6)
    assert row["agreement"] == pytest.approx(forced.divergence.agrees.mean())
    assert row["drift_layer_1"] == pytest.approx(forced.drift[1].mean(), abs=1e-6)
    steps = pl.read_parquet(tmp_path / "steps.parquet")
    assert steps.columns == [
        "trace_id",
        "trace",
        *GROUP,
        "layer",
        "step",
        "simulated_mass",
        "forced_mass",
        "simulated_lost_lookups",
        "forced_lost_lookups",
        "kl",
    ]
    own = steps.filter(policy="rkv").select(list(forced.steps()))
    assert own.equals(pl.DataFrame(forced.steps()))
    assert len(steps) == 2 * len(own)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shadow", "forced"])
def test_a_cap_leaves_room_for_the_buffer_at_either_level(level, name):
    code, out, err = level(name, "-p", "rkv", "--format", "json", budget="26!,20")
    assert (code, err) == (0, "")
    capped, kept = json.loads(out)
    assert [capped[name] for name in GROUP[2:]] == [26.0, "entries", "peak"]
    assert [kept[name] for name in GROUP[2:]] == [20.0, "entries", "kept"]
    measured = [name for name in kept if name not in GROUP]
    assert [capped[name] for name in measured] == [kept[name] for name in measured]
    assert re.search(r"rkv +26! ", level(name, "-p", "rkv", budget="26!")[1])


@pytest.mark.parametrize("name", ["shadow", "forced"])
def test_a_level_with_an_infeasible_budget_ends_as_a_replay_does(level, name):
    assert level(name, "-p", "rkv", budget="3")[0] == 5
    assert level(name, "-p", "rkv", budget="3,20")[0] == 1


def test_if_all_cells_fail_the_first_reason_is_the_exit_code(level):
    code, out, err = level("forced", "-p", "rkv", budget="3")
    assert (code, out) == (5, "")
    one_line(err, "budget 3 entries")


@pytest.mark.parametrize("option", ["--report", "--simulated"])
def test_what_a_level_does_not_use_is_no_option_of_it(level, tmp_path, option):
    code, _, err = level("forced", "-p", "rkv", option, tmp_path / "run")
    assert code == 2
    one_line(err, f"No such option: {option}")
