"""The table on terminals of different widths."""

import re
from io import StringIO

import polars as pl
import pytest
from rich.console import Console

from simulator.cells import run_replay
from simulator.engine.sampling import Sampling
from simulator.results.layout import plain_console, short_names
from simulator.results.standings import standings
from simulator.results.tables import summarise
from simulator.results.terminal import format_bytes, print_results, print_standings
from validate.live.terminal import print_accuracy, print_published


def printed(table, width):
    text = StringIO()
    print_results(table, Console(width=width, file=text))
    return text.getvalue()


def test_a_narrow_terminal_leaves_columns_out_and_says_so(make_trace):
    table = run_replay([make_trace(), make_trace()], ["rkv:buffer=4", "fullkv"], [12, 20]).table
    wide, narrow = printed(table, 200), printed(table, 70)
    assert "too narrow" not in wide
    assert "oracle " in wide
    assert "too narrow for entries peak, oracle" in narrow
    body = [line for line in narrow.splitlines() if "rkv" in line]
    assert len(body) == 2
    assert all("…" not in line and len(line) <= 70 for line in body)
    masses = summarise(table)["mass_mean"]
    assert all(f"{mass:.4f}" in narrow for mass in masses)


LONG = "rkv+cake:alpha=0.05,kernel_size=1,similarity_threshold=0.7,window=3,cake_window=4,buffer=4"


@pytest.mark.parametrize("width", [80, 100, 160])
def test_long_names_leave_numbers_whole_and_are_told_below(make_trace, width):
    table = run_replay([make_trace(), make_trace()], [LONG, "rkv:buffer=4"], [12, 20]).table
    text = StringIO()
    console = Console(width=width, file=text)
    print_results(table, console)
    print_standings(standings(table, "mass_mean"), "mass_mean", [], console)
    said = text.getvalue()
    assert "…" not in said
    assert all(f"{mass:.4f}" in said for mass in summarise(table)["mass_mean"])
    tables = [line for line in said.splitlines() if re.search(r"\d\.\d{4}", line) and "noise" not in line]
    assert all(len(line) <= width for line in tables)
    # Cut short in a table or not, the whole name is there to be copied.
    assert LONG.removesuffix(",buffer=4").partition(":")[0] in said
    assert "similarity_threshold=0.7" in said


def test_a_narrow_terminal_bears_columns_that_no_row_has(make_trace):
    table = run_replay(
        [make_trace(n_kv_heads=4, n_layers=3)], ["rkv:buffer=4"], [12, 20], sampling=Sampling(kv_heads=2)
    ).table
    assert not re.search(r"oracle +gap", printed(table, 200))
    assert "too narrow for entries peak" in printed(table, 50)


def test_parameters_that_all_share_stand_in_the_caption(make_trace):
    policies = ["rkv:buffer=4", "snapkv:buffer=4,window=3", "fullkv"]
    text = printed(run_replay([make_trace()], policies, [12]).table, 200)
    assert "buffer 4" in text.splitlines()[0]
    assert "snapkv:window=3 " in text
    assert "rkv " in text
    only_one = printed(run_replay([make_trace()], policies[:1], [12, 20]).table, 200)
    assert only_one.count("rkv:buffer=4 ") == 2


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1023, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20, "1.0 MiB"),
        (2**40, "1.0 TiB"),
    ],
)
def test_bytes_are_written_in_binary_units(count, text):
    assert format_bytes(count) == text


def test_long_names_are_told_below_a_table_so_that_numbers_stay_whole(capsys, monkeypatch):
    long = (
        "rkv+cake:window=30,kernel_size=1,group_reduce=max_weights,alpha=0.1265,similarity_threshold=0.3718"
    )
    row = {
        **{"family": "walk", "policy": long, "budget_asked": 20.0, "budget_unit": "%", "budget_kind": "kept"},
        **{"n_problems": 12, "accuracy": 0.25, "low": 0.1, "high": 0.5, "answered": 1.0, "looping": 0.0},
        **{"tokens": 700.0, "diverged_at": None, "bytes_peak": 2**20},
    }
    table = pl.DataFrame([row, row | {"policy": "rkv"}])
    print_accuracy(plain_console(160), table)
    out = capsys.readouterr().out
    assert "rkv+cake [1]" in out
    assert f"[1] {long}" in " ".join(out.split())
    assert "0.100 to 0.500" in out
    assert "20%" in out
    assert short_names(["rkv", "h2o"]) == ({"rkv": "rkv", "h2o": "h2o"}, [])
    assert short_names(["rkv", long]) == ({"rkv": "rkv", long: "rkv+cake [1]"}, [f"[1] {long}"])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    print_accuracy(plain_console(160), table)
    narrow = capsys.readouterr().out
    assert "…" not in narrow
    assert "too narrow for tokens" in " ".join(narrow.split())
    assert narrow.count("0.100 to 0.500") == 2
    published = {"model": "m", "benchmark": "b", "n_samples": 1, "published": None, "note": ""}
    table = table.with_columns(**{name: pl.lit(value) for name, value in published.items()})
    print_published(plain_console(160), table, "", "")
    narrow = capsys.readouterr().out
    assert "…" not in narrow
    assert narrow.count("10.00 to 50.00") == 2
