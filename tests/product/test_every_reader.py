"""Whatever option names a table or a document, damage is noticed before a number of it is used."""

from __future__ import annotations

import random
from io import BytesIO

import polars as pl
import pytest

from simulator.cells import run_replay
from simulator.report.sources import read_parquet
from simulator.results.output import write_parquet
from simulator.results.tables import RETAINED_SCHEMA, TRAJECTORY_SCHEMA
from traces.errors import UserError
from validate.live.fidelity_section import fidelity_section
from validate.live.output import read_simulated
from validate.protocol.prompts import prepare_prompts


@pytest.fixture
def trace(make_trace):
    return make_trace()


@pytest.fixture
def tables(trace):
    """Give the three tables of a replay."""
    return run_replay([trace], ["rkv:buffer=5"], [20], keep_retained=True, keep_trajectory=True)


@pytest.fixture
def readers(trace, tables):
    """Give, by option, the table that it names and what reads it."""
    return {
        "--trajectory": (
            tables.trajectory,
            lambda path: read_parquet(path, TRAJECTORY_SCHEMA, "--trajectory"),
        ),
        "--retained": (
            tables.retained,
            lambda path: read_parquet(path, RETAINED_SCHEMA, "--retained", [trace]),
        ),
        "--simulated": (tables.table, read_simulated),
    }


@pytest.mark.parametrize("option", ["--trajectory", "--retained", "--simulated"])
def test_no_flipped_bit_of_a_table_goes_unnoticed(readers, tmp_path, option):
    table, read = readers[option]
    path = tmp_path / "table.parquet"
    write_parquet(table, path)
    assert len(read(path)) == len(table)
    sound, rng = path.read_bytes(), random.Random(5)
    for _ in range(60):
        damaged = bytearray(sound)
        damaged[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{option} .*damaged"):
            read(path)


@pytest.mark.parametrize("option", ["--trajectory", "--retained", "--simulated"])
def test_a_table_of_other_columns_is_one_line(readers, tmp_path, option):
    table, read = readers[option]
    path = tmp_path / "table.parquet"
    for changed, words in (
        (table.drop("policy"), "has no column 'policy'"),
        (table.with_columns(budget_asked=pl.lit("20")), "column 'budget_asked' is String; allowed: Float64"),
    ):
        write_parquet(changed, path)
        with pytest.raises(UserError, match=words):
            read(path)
    with pytest.raises(UserError, match=rf"{option} .*none\.parquet: cannot be read: No such file"):
        read(tmp_path / "none.parquet")
    path.write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        read(path)


def test_rows_with_impossible_numbers_judge_nothing(tables, tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet(tables.table.with_columns(mass_mean=pl.lit(7.0)), path)
    with pytest.raises(UserError, match=r"--simulated .*row 1: mass_mean is 7\.0; allowed: 0 to 1\.05"):
        read_simulated(path)


def test_a_figure_of_a_damaged_trajectory_is_not_drawn(tables, tmp_path, run_sim):
    pytest.importorskip("vl_convert")
    path, out = tmp_path / "over.parquet", tmp_path / "a.svg"
    write_parquet(tables.trajectory, path)
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    code, _, err = run_sim("chart", path, "--out", out)
    assert code == 2
    assert "damaged" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("accuracy", "7", "row 1: accuracy is 7.0; allowed: 0 to 1"),
        ("accuracy", "NaN", "row 1: accuracy is nan; allowed: 0 to 1"),
        ("accuracy", "high", "column 'accuracy' is String; allowed: Float64"),
        ("budget_asked", "a lot", "column 'budget_asked' is String; allowed: Float64"),
        ("policy", "7", "column 'policy' is Int64; allowed: String"),
    ],
)
def test_accuracies_that_no_run_wrote_are_not_drawn(tables, tmp_path, column, value, words):
    row = {"family": "walk", "policy": "rkv", "policy_params": "{}", "budget_asked": "20", "budget_unit": "%"}
    row |= {"accuracy": "0.5", column: value}
    accuracy, fidelity = tmp_path / "accuracy.csv", tmp_path / "fidelity.csv"
    accuracy.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    fidelity.write_text("family,metric,spearman,spearman_within,regret\nwalk,gap,0.5,0.5,0.1\n")
    with pytest.raises(UserError) as refused:
        fidelity_section(tables.table, fidelity, accuracy, ["gap"])
    assert words in str(refused.value)


@pytest.mark.slow
def test_damaged_problems_in_parquet_are_one_line(tmp_path):
    """Such a file is another program's, and the reader may end the process at some of its bytes."""
    buffer = BytesIO()
    pl.DataFrame({"problem": ["a", "b"] * 50, "answer": ["1", "2"] * 50}).write_parquet(buffer)
    sound, rng = buffer.getvalue(), random.Random(1)
    for number in range(12):
        damaged = bytearray(sound)
        for _ in range(8):
            damaged[rng.randrange(len(sound) // 2, len(sound))] ^= 1 << rng.randrange(8)
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"benchmark 'b': its prompts .* cannot be read"):
            prepare_prompts("b", str(path), "{problem}", tmp_path / "out")
    with pytest.raises(UserError, match="cannot be read: embedded null byte"):
        prepare_prompts("b", "a\0b", "{problem}", tmp_path / "out")
