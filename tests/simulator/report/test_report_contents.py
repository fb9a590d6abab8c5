"""What a report says: tokens held, heads summarised, leaders named, files refused, pictures written."""

import base64
import html
import sys

import numpy as np
import polars as pl
import pytest

from simulator.cells import run_replay
from simulator.charts.style import ordered_policies
from simulator.report.cells import MOST_CELLS, cell_panels
from simulator.report.contents import report
from simulator.report.heads import head_summary
from simulator.report.quality import quality_figures, quality_rows
from simulator.report.sources import chosen
from simulator.report.tables import means_table, standings_table, verdict, what_was_replayed
from simulator.report.tokens import KeptTokens, kept_tokens
from simulator.results.output import write_parquet
from traces.errors import UserError

POLICIES = ["fullkv", "rkv:buffer=5", "rkv:buffer=5,alpha=0.5", "random:buffer=6,prompt=wait"]


@pytest.fixture
def trace(make_trace):
    return make_trace(n_layers=2, n_tokens=70, prompt_tokens=30)


@pytest.fixture
def replayed(trace):
    return run_replay([trace], POLICIES, [14, "40%"], keep_retained=True, keep_trajectory=True)


def held_by(trace, retained, time, position):
    """Count heads that hold a position at a time, one head after the other."""
    count = 0
    for layer in range(trace.shape.n_layers):
        for head in range(trace.shape.n_kv_heads):
            own = retained.filter((pl.col("layer") == layer) & (pl.col("kv_head") == head))
            before = [step for step in own["n_tokens"].unique().to_list() if step <= time]
            last = max(before, default=0)
            kept = own.filter(pl.col("n_tokens") == last)["position"].to_list()
            count += position in kept or position >= last
    return count


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["rkv", "random"])
def test_tokens_are_held_by_the_heads_that_retain_them(trace, replayed, policy):
    retained = replayed.retained.filter(policy=policy, budget_asked=14, budget_unit="entries")
    retained = retained.filter(policy_params=retained["policy_params"][0])
    kept = kept_tokens(retained, trace)
    steps = retained["n_tokens"].unique().sort().to_list()
    assert kept.times.tolist() == sorted({*steps, 70})
    assert kept.n_heads == 4
    for time, counts in zip(kept.times.tolist(), kept.counts, strict=True):
        assert counts.tolist() == [held_by(trace, retained, time, position) for position in range(time)]


def test_a_head_that_never_compresses_holds_all(trace, replayed):
    retained = replayed.retained.filter(policy="random", budget_asked=14, budget_unit="entries")
    kept = kept_tokens(retained.filter(pl.col("layer") == 0), trace)
    assert all(counts.min() >= 2 for counts in kept.counts)


def test_counts_are_packed_in_order_of_time(trace, replayed):
    kept = kept_tokens(
        replayed.retained.filter(policy="random", budget_asked=14, budget_unit="entries"), trace
    )
    told = kept.encoded()
    assert list(base64.b64decode(told["counts"])) == np.concatenate(kept.counts).tolist()
    assert (told["size"], told["heads"]) == (1, 4)
    many = KeptTokens(np.array([3]), [np.array([0, 255, 300])], 300).encoded()
    assert np.frombuffer(base64.b64decode(many["counts"]), "<u2").tolist() == [0, 255, 300]


def test_many_times_are_thinned_with_both_ends(make_trace):
    long = make_trace(n_layers=1, n_tokens=220, prompt_tokens=20)
    retained = run_replay([long], ["tova:trigger=per-step"], [14], keep_retained=True).retained
    times = kept_tokens(retained, long).times
    assert len(times) == 60
    assert (times[0], times[-1]) == (retained["n_tokens"].min(), 220)


def test_heads_are_summarised_by_steps(replayed):
    own = replayed.trajectory.filter(policy="random", budget_asked=14, budget_unit="entries")
    found = head_summary(own)
    row = replayed.table.filter(policy="random", budget_unit="entries").row(0, named=True)
    assert found["mass"].to_numpy().mean() == pytest.approx(row["mass_mean"], abs=1e-6)
    last = own.filter(pl.col("compression").is_null()).sort("layer", "kv_head")
    assert found["budget"].to_list() == last["budget_entries"].to_list()


def test_policies_of_one_name_are_told_apart_in_all_tables(trace, replayed):
    sources = chosen(replayed.table, replayed.trajectory, replayed.retained, [], [])
    names = {"rkv:alpha=0.1", "rkv:alpha=0.5", "random"}
    assert set(sources.rows["policy"]) == {*names, "fullkv"}
    panels = cell_panels(sources.trajectory, sources.retained, [trace]).panels
    assert {panel.title for panel in panels} == {
        f"{name} at {at}, {trace.path.stem}" for name in names for at in ("14", "40%")
    }
    assert all(len(panel.figures) == 3 and panel.kept for panel in panels)


@pytest.mark.slow
def test_what_does_not_fit_is_counted(trace):
    budgets = list(range(12, 12 + MOST_CELLS))
    result = run_replay([trace], ["rkv:buffer=5", "random:buffer=5"], budgets, keep_trajectory=True)
    cells = cell_panels(result.trajectory, None, [])
    assert (len(cells.panels), cells.n_left_out) == (MOST_CELLS, MOST_CELLS)
    # Policies at one budget are kept together.
    assert [panel.title for panel in cells.panels[:2]] == [
        f"{name} at 12, {trace.path.stem}" for name in ("rkv", "random")
    ]


@pytest.mark.slow
def test_a_trace_with_text_comes_first(make_trace):
    several = [make_trace() for _ in range(3)]
    trajectory = run_replay(several, ["rkv:buffer=5"], [12, 14], keep_trajectory=True).trajectory
    for trace in several:
        first, *_ = cell_panels(trajectory, None, [trace]).panels
        assert first.title == f"rkv at 12, {trace.path.stem}"


def rows(values):
    """Give rows of two policies at one budget: one value per trace, and the bytes held."""
    return pl.DataFrame(
        [
            {
                "trace_id": str(number),
                "policy": policy,
                "policy_params": "{}",
                "budget_asked": 10.0,
                "budget_unit": "%",
                "budget_kind": "kept",
                "bytes_mean": held,
                "n_evictions": 5,
                "mass_mean": value,
                "status": "ok",
            }
            for policy, (held, own) in values.items()
            for number, value in enumerate(own)
        ]
    )


def test_the_verdict_names_the_leader_and_what_is_noise():
    own = rows({"a": (10, [0.5, 0.6, 0.7]), "b": (10, [0.6, 0.5, 0.7]), "c": (9, [0.1, 0.2, 0.3])})
    found = quality_rows(own, "mass_mean")
    text = verdict(found, "mass_mean")
    first, tied = ("a", "b") if "At 10% a" in text else ("b", "a")
    assert text == (
        f"At 10% {first} retains most attention; not told apart from it: {tied}; worse: c. "
        f"Decode next: {first} and {tied}."
    )
    table = standings_table(found, "mass_mean")
    assert {name: [tuple(cell.values()) for cell in cells] for name, cells in table.items()} == {
        first: [("60.0%", True)],
        tied: [("=\N{NO-BREAK SPACE}60.0%", False)],
        "c": [("20.0%", False)],
    }
    # What holds less memory stays on the front, however little it retains.
    assert set(found.filter("is_front")["policy"]) == {"a", "b", "c"}
    alone = quality_rows(own.filter(pl.col("trace_id") == "0"), "mass_mean")
    assert "One trace tells nothing of noise" in verdict(alone, "mass_mean")


def test_a_policy_that_another_betters_is_behind_the_front():
    own = quality_rows(rows({"a": (10, [0.5, 0.6]), "b": (11, [0.4, 0.5])}), "mass_mean")
    assert own.filter("is_front")["policy"].to_list() == ["a"]
    assert verdict(own, "mass_mean") == (
        "At 10% a retains most attention; not told apart from it: none; worse: b. Decode next: a."
    )


@pytest.mark.slow
def test_failed_cells_are_told(replayed):
    broken = pl.when(pl.col("policy") == "random")
    table = replayed.table.with_columns(
        status=broken.then(pl.lit("error")).otherwise("status"), error=broken.then(pl.lit("it <broke>."))
    )
    assert "2 of 8 cells failed and are left out: it <broke>." in what_was_replayed(table)
    assert "it &lt;broke&gt;" in report(chosen(table, None, None, [], [])).text
    assert "random" not in {line[0] for line in means_table(table)["lines"]}


def test_what_a_sample_cannot_tell_is_left_empty(replayed):
    gone = pl.lit(None, dtype=pl.Float64)
    table = replayed.table.with_columns(
        oracle_mass=gone, lost_lookup_peak=gone, sampling=pl.lit("an eighth of the queries")
    )
    sources = chosen(table, None, None, [], [])
    text = report(sources).text
    assert "Only a sample was measured: an eighth of the queries." in text
    assert "Black and dashed" not in text
    assert "worst step" not in means_table(table)["head"]
    some = pl.concat([replayed.table.head(4), table.tail(4)], how="diagonal_relaxed")
    assert any("" in line for line in means_table(some)["lines"])
    with pytest.raises(UserError, match="lost_lookup_peak is empty in 8 rows, as it is of samples"):
        report(sources, ["lost_lookup_peak"])


# The command -----------------------------------------------------------------------------------------------


@pytest.fixture
def files(trace, replayed, tmp_path):
    write_parquet(replayed.table, tmp_path / "rows.parquet")
    write_parquet(replayed.trajectory, tmp_path / "over-time.parquet")
    write_parquet(replayed.retained, tmp_path / "kept.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    return {
        "rows": tmp_path / "rows.parquet",
        "over": tmp_path / "over-time.parquet",
        "kept": tmp_path / "kept.parquet",
        "text": tmp_path / "text.parquet",
        "trace": trace.path,
        "out": tmp_path / "page.html",
    }


@pytest.mark.slow
def test_a_page_and_its_pictures_are_written(run_sim, files, tmp_path):
    pytest.importorskip("vl_convert")
    options = ["--trajectory", files["over"], "--retained", files["kept"], "--trace", files["trace"]]
    chosen_cell = ["-p", "random", "-b", "14", "--metric", "mass_p05", "--charts", tmp_path / "charts"]
    code, out, err = run_sim("report", files["rows"], *options, *chosen_cell, "--out", files["out"])
    assert (code, err) == (0, "")
    assert "5 charts" in out
    assert "wrote 10 pictures" in out
    names = {f"{kind}-mass_p05" for kind in ("pareto", "budget")}
    names |= {f"{kind}-cell-0" for kind in ("mass-map", "budget-map", "budgets")}
    for name in names:
        assert b"random" in (tmp_path / "charts" / f"{name}.svg").read_bytes()
        assert (tmp_path / "charts" / f"{name}.png").read_bytes()[1:4] == b"PNG"
    page = files["out"].read_text(encoding="utf-8")
    assert "random at 14" in page
    assert "random at 40%" not in page


def test_one_command_replays_what_the_page_shows(run_sim, files):
    pytest.importorskip("vl_convert")
    asked = ["--trace", files["trace"], "-p", "rkv", "-b", "14", "--buffer", "5", "--jobs", "1"]
    code, out, err = run_sim("report", *asked, "--out", files["out"])
    assert (code, err) == (0, "")
    assert "5 charts" in out
    assert 'id="slider-cell-0"' in files["out"].read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{rows}", "--out", "page.pdf"], "suffix is '.pdf'; allowed: .html"),
        (["{rows}", "--out", "nowhere/page.html"], "nowhere is missing"),
        (["{rows}", "--retained", "{kept}"], "--retained is given without --trace"),
        (["{rows}", "--fidelity", "{text}"], "--fidelity is given without --accuracy"),
        (["{rows}", "--trajectory", "{kept}"], "--trajectory {kept} has no column 'trace'"),
        (["{rows}", "--trajectory", "{text}"], "--trajectory {text} is damaged or no Parquet file"),
        (["{rows}", "--retained", "{kept}", "--trace", "sample"], "has no row of --trace walk-"),
        (["{rows}", "--trajectory", "gone.parquet"], "--trajectory gone.parquet: cannot be read"),
        (["{rows}", "--metric", "speed"], "--metric is 'speed'; allowed: lost_lookup_peak"),
        (["{rows}", "--seed", "-1"], "--seed is -1; allowed: a whole number from 0"),
        (
            ["{rows}", "--metric", "speed", "--fidelity", "{text}", "--accuracy", "{text}"],
            "--metric is 'speed'",
        ),
        (["{rows}", "--policy", "rkvv"], "--policy is 'rkvv'; did you mean 'rkv'?; the rows have: "),
        (["{rows}", "--budget", "15"], "--budget is '15'; the rows have: 14, 40%"),
        (["{rows}", "--policy", "fullkv"], "no row is of a policy that evicted"),
        (["{rows}", "--buffer", "5"], "--buffer is for a replay"),
        ([], "needs rows of sim replay -o, or --trace to replay"),
        (["--trajectory", "{over}"], "--trajectory goes with rows of the same replay"),
        (["--trace", "{trace}", "-p", "rkv:buffer=5", "-b", "2"], "no cell could be replayed"),
        (
            ["{rows}", "--fidelity", "{text}", "--accuracy", "{text}"],
            "--fidelity {text} is damaged or no par",
        ),
    ],
)
def test_a_report_that_cannot_be_made_is_one_line(run_sim, files, arguments, words, monkeypatch, tmp_path):
    pytest.importorskip("vl_convert")
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(**files) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", files["out"]]
    code, _, err = run_sim("report", *arguments)
    assert code in (2, 5)
    assert words.format(**files) in err
    assert len(err.splitlines()) == 1
    assert not files["out"].exists()


def test_a_report_without_its_packages_is_refused(run_sim, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    code, _, err = run_sim("report", files["rows"], "--out", files["out"])
    assert code == 2
    assert "pip install 'kvbudget[plots]'" in err


def test_accuracies_of_other_cells_are_refused(replayed, tmp_path):
    pytest.importorskip("altair")
    from validate.live.fidelity_section import fidelity_section

    told = {"family": "maths", "metric": "mass_mean", "spearman": 1.0, "spearman_within": 1.0, "regret": 0.0}
    pl.DataFrame([told]).write_csv(tmp_path / "f.csv")
    other = replayed.table.select("policy", "policy_params", "budget_asked", "budget_unit")
    other.with_columns(family=pl.lit("maths"), accuracy=0.5).write_csv(tmp_path / "a.csv")
    with pytest.raises(UserError, match="no family, policy and budget of it is in the rows"):
        fidelity_section(replayed.table, tmp_path / "f.csv", tmp_path / "a.csv", ["mass_mean"])


def test_a_policy_looks_the_same_in_every_chart_of_a_page(replayed):
    everyone = ordered_policies(replayed.table["policy"].to_list())
    few = quality_rows(replayed.table.filter(pl.col("policy") != everyone[0]), "mass_mean")
    specifications = [
        str(figure.specification())
        for figures in (
            quality_figures(quality_rows(replayed.table, "mass_mean"), "mass_mean", everyone),
            quality_figures(few, "mass_mean", everyone),
        )
        for figure in figures
    ]
    domains = {
        text[text.index("'domain': [") : text.index("]", text.index("'domain': ["))]
        for text in specifications
    }
    assert len(domains) == 1


def test_of_a_crowd_the_leading_stand_out_at_first():
    crowd = quality_rows(rows({f"p{i:02}": (10, [i / 40, i / 30]) for i in range(20)}), "mass_mean")
    text = str(quality_figures(crowd, "mass_mean")[0].specification())
    assert "{'policy': 'p19'}" in text
    assert "{'policy': 'p03'}" not in text
    assert "{'policy': 'p01'}" not in str(
        quality_figures(quality_rows(rows({"p01": (10, [0.1, 0.2])}), "mass_mean"), "mass_mean")[
            0
        ].specification()
    )


def test_a_page_says_what_made_it(replayed):
    text = report(chosen(replayed.table, None, None, [], []), made_by="sim report rows.parquet").text
    footer = text.partition("<footer>")[2].partition("</footer>")[0]
    assert "Command: sim report rows.parquet" in footer
    assert replayed.table["code_version"][0] in footer


def test_the_first_at_a_budget_is_bold(replayed):
    table = replayed.table.filter(pl.col("policy").is_in(["fullkv", "random"]))
    text = report(chosen(table, None, None, [], []), ["mass_mean"]).text
    told = standings_table(quality_rows(table, "mass_mean"), "mass_mean")["random"]
    assert all(f"<td><strong>{cell['text']}</strong></td>" in text for cell in told)


@pytest.mark.parametrize("policy", ["<b>rkv</b>", "a&b", '"quoted"'])
def test_names_are_text_and_never_tags(replayed, policy):
    named = pl.when(pl.col("policy") == "random").then(pl.lit(policy)).otherwise("policy")
    page = report(chosen(replayed.table.with_columns(policy=named), None, None, [], []), made_by=policy).text
    words = page.partition("<script")[0]
    assert policy not in words
    assert words.count(html.escape(policy).replace("&quot;", "&#34;")) > 2


@pytest.mark.slow
def test_a_searchs_folder_makes_a_page(make_trace, run_sim, tmp_path):
    first, second, third, fourth = (make_trace().path for _ in range(4))
    out, page = tmp_path / "search", tmp_path / "page.html"
    asked = ["--trace", first, "--trace", second, "--held-out", third, "--held-out", fourth]
    asked += [
        "--against",
        "rkv",
        "--budget",
        "20",
        "--buffer",
        "5",
        "--trials",
        "6",
        "--minutes",
        "1",
        "--scorers",
        "rkv",
    ]
    code, _, err = run_sim(
        "search", *asked, "--layers", "uniform", "--heads", "uniform", "--out", out, "--jobs", "1"
    )
    assert code == 0, err
    assert run_sim("report", out, "--out", page)[0] == 0
    text = page.read_text()
    assert "What the search found" in text
    assert "Judged on traces that had no part in the choice" in text
    (out / "verdicts.parquet").write_bytes(b"PAR1")
    code, _, err = run_sim("report", out, "--out", page)
    assert (code, err.count("\n")) == (2, 1)
