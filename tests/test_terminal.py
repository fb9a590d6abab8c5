"""The table on terminals of different widths."""

from io import StringIO

import polars as pl
import pytest
from rich.console import Console

from simulator.cells import run_replay
from simulator.results import summarise
from simulator.terminal import format_bytes, print_results
from validate.live.terminal import print_accuracy, short_names


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


def test_long_names_are_told_below_a_table_so_that_numbers_stay_whole(capsys):
    long = (
        "rkv+cake:window=30,kernel_size=1,group_reduce=max_weights,alpha=0.1265,similarity_threshold=0.3718"
    )
    row = {
        **{"family": "walk", "policy": long, "budget_asked": 20.0, "budget_unit": "%", "budget_kind": "kept"},
        **{"n_problems": 12, "accuracy": 0.25, "low": 0.1, "high": 0.5, "answered": 1.0, "looping": 0.0},
        **{"tokens": 700.0, "diverged_at": None, "bytes_peak": 2**20},
    }
    print_accuracy(pl.DataFrame([row, row | {"policy": "rkv"}]))
    out = capsys.readouterr().out
    assert "rkv+cake [1]" in out
    assert f"[1] {long}" in " ".join(out.split())
    assert "0.100 to 0.500" in out
    assert "20%" in out
    assert short_names(["rkv", "h2o"]) == ({"rkv": "rkv", "h2o": "h2o"}, [])
