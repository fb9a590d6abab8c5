"""The command line as a new user meets it: versions, help, near misses, what was written."""

from __future__ import annotations

import pytest

from traces.version import package_version


def one_line(err, *words):
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("sim: ")
    for word in words:
        assert str(word) in err


@pytest.fixture
def trace_path(make_trace):
    return make_trace(n_tokens=90, prompt_tokens=30).path


def test_versions_are_told(run_sim):
    code, out, _ = run_sim("--version")
    assert code == 0
    assert out.splitlines()[:2] == [f"kvbudget {package_version()}", "trace format 1.2"]
    assert any(line.startswith("numba ") for line in out.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb",
    [
        *("", "record", "calibrate", "replay", "sweep", "search", "results", "report", "chart", "bench"),
        *("validate", "validate live", "validate shadow", "validate forced", "validate protocol"),
        *("validate bench", "reasoner", "reasoner problems", "reasoner train", "reasoner evaluate"),
        *("trace", "trace info", "policies", "policies show"),
    ],
)
def test_every_verb_has_short_help_and_those_with_options_an_example(run_sim, verb):
    code, out, _ = run_sim(*verb.split(), "-h")
    assert code == 0
    assert "-h, --help" in out
    if verb and not verb.startswith("trace"):
        assert f"Example: sim {verb} " in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "rvk"], "'rvk' is unknown; did you mean 'rkv'? see sim policies list"),
        (["-p", "xyzzy"], "'xyzzy' is unknown; allowed: fullkv, streamingllm"),
        (
            ["-p", "rkv:aplha=1"],
            "parameter 'aplha' is unknown; did you mean 'alpha'?; allowed: alpha, buffer",
        ),
        (["-p", "rkv:trigger=pre-step"], "trigger is 'pre-step'; did you mean 'per-step'?; allowed"),
        (
            ["-p", "rkv", "a.kvtrace", "b.kvtrace"],
            "unexpected extra argument(s) (a.kvtrace b.kvtrace); an option",
        ),
    ],
)
def test_a_slip_is_told_with_what_may_have_been_meant(run_sim, arguments, words):
    code, _, err = run_sim("replay", "-t", "sample", "-b", "20%", *arguments)
    assert code == 2
    one_line(err, words)


def test_what_is_written_is_said(run_sim, trace_path, tmp_path):
    rows, kept = tmp_path / "rows.parquet", tmp_path / "kept.parquet"
    asked = [
        "replay",
        "-t",
        trace_path,
        "-p",
        "rkv",
        "-b",
        "20",
        "--buffer",
        "5",
        "-o",
        rows,
        "--retained",
        kept,
    ]
    _, out, err = run_sim(*asked)
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == f"sim: wrote {rows}: 1 row"
    assert lines[1].startswith(f"sim: wrote {kept}: ")
    assert run_sim(*asked, "-q")[2] == ""


def test_a_line_stays_short_whatever_was_given(run_sim):
    code, _, err = run_sim("replay", "-t", "sample", "-p", "y" * 70_000, "-b", "20%")
    assert code == 2
    assert len(err) < 1300
    one_line(err, "policy 'yyy")
    assert err.rstrip().endswith("FILE.py:CLASS")
