"""Bars on a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys

import pytest

from traces.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(monkeypatch):
    """Let standard error be a terminal; give all that is written to it."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    return shown


def test_a_bar_counts_what_is_done_and_takes_words(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with progress("replaying", 3, quiet=False) as advance:
        advance()
        advance()
        advance(told="[1] failed", refresh=True)
    assert "replaying" in terminal.getvalue()
    assert "2/3" in terminal.getvalue()
    assert "[1] failed" in terminal.getvalue()


def test_a_bar_may_learn_its_length_later(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with progress("replaying", None, quiet=False) as show:
        show(total=5, completed=4, refresh=True)
    assert "4/5" in terminal.getvalue()


@pytest.mark.parametrize("quiet", [True, False])
def test_nobody_is_shown_a_bar_who_wants_or_sees_none(quiet, monkeypatch):
    shown = Terminal() if quiet else io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    with progress("replaying", 3, quiet=quiet) as advance:
        advance()
        advance(told="words")
    assert shown.getvalue() == ""
