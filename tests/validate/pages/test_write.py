"""Tables of the pages: written where their markers stand, and nowhere else."""

import subprocess
import sys

import polars as pl
import pytest

from traces.errors import UserError
from validate.pages import write as module
from validate.pages.write import made, page_table, pages
from validate.reasoner.tables import result_table

BLOCK = "before\n<!-- table: levels -->\n{}<!-- end -->\nafter\n"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "PAGES", ("PAGE.md",))
    return tmp_path / "PAGE.md"


def test_a_table_is_written_between_its_markers(checkout, capsys):
    checkout.write_text(BLOCK.format("stale\n"))
    pages()
    assert checkout.read_text() == BLOCK.format(page_table("levels") + "\n")
    assert capsys.readouterr().err == "sim: PAGE.md: written\n"
    pages(check=True)
    assert capsys.readouterr().err == ""


def test_a_check_names_what_differs_and_writes_nothing(checkout, capsys):
    checkout.write_text(BLOCK.format("stale\n"))
    with pytest.raises(SystemExit) as ended:
        pages(check=True)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "sim: PAGE.md: differs from the stored tables\n"
    assert checkout.read_text() == BLOCK.format("stale\n")


def test_what_is_missing_or_unknown_is_told_in_a_line(checkout):
    with pytest.raises(UserError, match=r"PAGE\.md is missing; allowed: in a checkout"):
        pages()
    with pytest.raises(UserError, match="page table is 'level'; allowed: predictors, "):
        made(BLOCK.replace("levels", "level").format(""))


def test_asking_for_pages_loads_little():
    code = "import sys, validate.pages.write; print({'polars', 'numpy', 'torch'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_levels_are_the_differences_of_accuracies():
    """Intervals of paired problems cannot be had from the stored accuracies; their means can."""
    accuracy = result_table("accuracy").filter(family="all")
    base = accuracy.filter(policy="rkv").select("budget_asked", base="accuracy")
    known = accuracy.join(base, on="budget_asked").with_columns(known=pl.col("accuracy") - pl.col("base"))
    levels = result_table("levels").join(
        known.select("policy", "budget_asked", "known"), on=["policy", "budget_asked"]
    )
    assert len(levels) == 18
    assert (levels["difference"] - levels["known"]).abs().max() <= 0.0005 + 1e-12
    assert (levels["low"] < levels["difference"]).all()
    assert (levels["difference"] < levels["high"]).all()
