"""``sim search``: find a policy on some traces, and say whether it holds on others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli.completion import metrics, policies
from simulator.results.metric_names import DEFAULT_METRIC, METRICS

if TYPE_CHECKING:
    from simulator.search.study import Question, Tried


def search(
    trace: Annotated[
        list[str], typer.Option("--trace", "-t", help="Traces that policies are chosen on: as of sim replay.")
    ],
    held_out: Annotated[list[str], typer.Option(help="Other traces, for the final score; repeats.")],
    out: Annotated[Path, typer.Option(help="Folder of the study and its results; resumes.")],
    budget: Annotated[
        list[str], typer.Option("--budget", "-b", help="Comma list; several give a front over memory.")
    ],
    metric: Annotated[
        str,
        typer.Option(help=f"What is to be better: {', '.join(METRICS)}.", autocompletion=metrics),
    ] = DEFAULT_METRIC,
    minutes: Annotated[float, typer.Option(help="How long this run searches.")] = 15.0,
    trials: Annotated[
        int | None, typer.Option(help="Stop when the study has so many.", show_default="none")
    ] = None,
    against: Annotated[
        str, typer.Option(help="The policy to beat.", autocompletion=policies)
    ] = "reasonalloc",
    also: Annotated[str, typer.Option(help="Policies to start from and to compare with.")] = "rkv,snapkv",
    scorers: Annotated[
        str | None, typer.Option(help="Comma list of scorers.", show_default="rkv,snapkv,snapkv-paper")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Comma list of layer allocators.",
            show_default="uniform,wave,wave-dynamic,pyramid,cake,squeeze",
        ),
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Comma list of head allocators.", show_default="uniform,utility,adakv")
    ] = None,
    ranges: Annotated[Path | None, typer.Option(help="Ranges of parameters (TOML).")] = None,
    buffer: Annotated[
        int | None, typer.Option(help="Entries added between compressions, for every policy (default 128).")
    ] = None,
    wave: Annotated[list[Path] | None, typer.Option(help="Wave made by sim calibrate; repeats.")] = None,
    keep: Annotated[int, typer.Option(help="Policies per budget that the held-out traces judge.")] = 3,
    check: Annotated[bool, typer.Option(help="Check checksums and invariants of every trace first.")] = True,
    seed: Annotated[int, typer.Option(help="Of the search, of samples and of policies that draw.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes; 0 uses all cores. One repeats exactly.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Search for policies on some traces; judge the best on others."""
    from simulator.workers.blas import use_one_thread, warn

    use_one_thread()
    from simulator.kernels.compiled import tell_compiling
    from traces.extras import require_extra

    tell_compiling()
    require_extra("a search", "optuna")
    import time

    from simulator.budget import parse_budgets
    from simulator.cli.replay import worker_count
    from simulator.policies.language import split_list
    from simulator.policies.wave import known_waves
    from simulator.results.tables import require_one_model
    from simulator.search.judge import SEARCHABLE
    from simulator.search.space import make_space
    from simulator.search.study import Question, open_study
    from simulator.search.workers import search_together
    from traces.check import check_trace
    from traces.errors import Interrupted, UserError
    from traces.lock import locked
    from traces.seeds import require_seed
    from traces.store import find_traces, open_trace

    if metric not in SEARCHABLE:
        raise UserError(f"--metric is '{metric}'; allowed: {', '.join(SEARCHABLE)}")
    require_seed(seed, "--seed")
    for name, value, least in (("--minutes", minutes, 0), ("--keep", keep, 1)):
        if value < least:
            raise UserError(f"{name} is {value}; allowed: {least} or more")
    workers = worker_count(jobs)
    parts = {"scorer": scorers, "layers": layers, "heads": heads}
    budgets = [str(own) for own in parse_budgets(budget)]
    space = make_space(
        {role: None if text is None else split_list(text) for role, text in parts.items()},
        budgets,
        {} if buffer is None else {"buffer": buffer},
        ranges,
    )
    known = known_waves(wave or [])
    chosen_on, judged_on = find_traces(trace), find_traces(held_out)
    others = [text for text in split_list(also) if text]
    for text in (against, *others):
        space.parse(text)
    # A copy of a trace counts once.
    searched, judging = (
        {own.trace_id: own for own in map(open_trace, paths)} for paths in (chosen_on, judged_on)
    )
    for trace_id, own in judging.items():
        if trace_id in searched:
            raise UserError(
                f"--held-out has {own.path.name}, which policies are chosen on; allowed: other traces"
            )
    for own in [*searched.values(), *judging.values()]:
        if own.total_tokens == own.prompt_tokens:
            raise UserError(f"trace {own.path} has no decode step after its prompt; nothing to replay")
        if check:
            check_trace(own)
    require_one_model(own.model for own in [*searched.values(), *judging.values()])
    question = Question(
        tuple(str(own.path) for own in searched.values()), metric, against, space, known, seed
    )
    judge = question.judge()
    for item in budgets:
        for text in (against, *others):
            judge.require_replayable(space.parse(text), item)
    warn(workers)
    out.mkdir(parents=True, exist_ok=True)
    study = out / "study.db"
    try:
        # Two searches in one folder would end each other's trials.
        with locked(out, wait=False):
            open_study(study, question, [against, *others])
            deadline = time.time() + 60 * minutes
            with _progress(study, minutes, quiet) as advance:
                search_together(study, question, workers, deadline, trials, advance)
            _conclude(out, question, list(judging.values()), others, keep, workers, quiet)
    except BlockingIOError:
        raise UserError(
            f"--out {out}: another search runs there; allowed: another folder, or later"
        ) from None
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: run the same command again, it goes on with {study}") from None


def _conclude(
    out: Path, question: Question, judged_on: list[Any], others: list[str], keep: int, jobs: int, quiet: bool
) -> None:
    """Choose by the search's traces, judge by the others, print and write both."""
    from simulator.cli.replay import progress
    from simulator.results.output import write_parquet
    from simulator.search.study import Tried, count_trials, whole_trials
    from simulator.search.terminal import print_search
    from simulator.search.verdict import candidates, front, judge_held_out, replay_held_out, write_winners
    from traces.errors import UserError

    study = out / "study.db"
    tried, judge = whole_trials(study), question.judge()
    if not tried:
        raise UserError(f"{study} has no trial on all traces yet; allowed: more --minutes")
    chosen: list[tuple[str, Tried]] = []
    for budget in question.space.budgets:
        base = judge.worth_of_base(budget)
        chosen.append(("base", Tried(question.base, budget, base)))
        best = candidates(tried, base, budget, judge.sign, keep)
        chosen += [("winner" if place == 0 else "runner-up", own) for place, own in enumerate(best)]
        for text in others:
            worth = judge.worth(question.space.parse(text), budget, -1)
            chosen.append(("published", Tried(text, budget, worth)))
    asked = list(dict.fromkeys((own.policy, own.budget) for _, own in chosen))
    with progress("judging on held-out traces", len(judged_on) * len(asked), quiet) as advance:
        rows = replay_held_out(judged_on, asked, question, jobs, advance)
    verdicts = judge_held_out(rows, chosen, question.base, question.metric, seed=question.seed)
    undominated = front(tried, judge.sign)
    write_parquet(rows, out / "held-out.parquet")
    write_parquet(undominated, out / "front.parquet")
    write_parquet(verdicts, out / "verdicts.parquet")
    write_winners(out / "winners.json", verdicts, question.metric, dict(question.space.fixed))
    print_search(undominated, verdicts, question, count_trials(study), len(judge.traces))
    print(f"wrote {out / 'winners.json'}, for sim validate --configs", file=sys.stderr)


@contextmanager
def _progress(study: Path, minutes: float, quiet: bool) -> Iterator[Callable[[], None]]:
    """Show how long is left and what was tried; gives what looks again."""
    import time

    if quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from simulator.search.study import count_trials

    columns = TextColumn("searching"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[told]}")
    started = last = time.time()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=60 * minutes, told="")

        def look() -> None:
            nonlocal last
            if time.time() - last > 1:
                last = time.time()
                told = ", ".join(f"{count} {name}" for name, count in count_trials(study).items())
                bar.update(task, completed=last - started, told=told)

        yield look
