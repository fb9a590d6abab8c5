"""``sim search``: find a policy on some traces, and say whether it holds on others."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli import shared
from simulator.cli.completion import policies, searchable
from simulator.results.metric_names import DEFAULT_METRIC, SEARCHABLE, SHIFT
from traces.progress import progress, shows_progress

if TYPE_CHECKING:
    from simulator.search.study import Question, Tried
    from traces.trace import Trace


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
        typer.Option(help=f"What is to be better: {', '.join(SEARCHABLE)}.", autocompletion=searchable),
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
    buffer: shared.Buffer = None,
    wave: shared.Waves = None,
    keep: Annotated[int, typer.Option(help="Policies per budget that the held-out traces judge.")] = 3,
    check: shared.Check = True,
    seed: Annotated[int, typer.Option(help="Of the search, of samples and of policies that draw.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes; 0 uses all cores. One repeats exactly.")] = 0,
    quiet: shared.Quiet = False,
) -> None:
    """Search for policies on some traces; judge the best on others."""
    shared.prepare_kernels()
    from traces.extras import require_extra

    require_extra("a search", "optuna")
    from simulator.budget import parse_budgets
    from simulator.policies.language import split_list
    from simulator.policies.wave import known_waves
    from simulator.search.space import make_space
    from simulator.search.study import Question, open_study
    from simulator.workers.blas import warn
    from simulator.workers.cores import worker_count
    from traces.errors import UserError
    from traces.seeds import require_seed

    if metric not in SEARCHABLE:
        raise UserError(f"--metric is '{metric}'; allowed: {', '.join(SEARCHABLE)}")
    require_seed(seed, "--seed")
    for name, value, least in (("--minutes", minutes, 0), ("--keep", keep, 1)):
        if not least <= value < math.inf:
            raise UserError(f"{name} is {value}; allowed: {least} or more")
    if trials is not None and trials < 1:
        raise UserError(f"--trials is {trials}; allowed: 1 or more")
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
    searched, judging = _open_traces(trace), _open_traces(held_out)
    others = [text for text in split_list(also) if text]
    for text in (against, *others):
        space.parse(text)
    _require_searchable(searched, judging, metric, check)
    paths = tuple(str(own.path) for own in searched.values())
    question = Question(paths, metric, against, space, known, seed)
    judge = question.judge()
    for item in budgets:
        for text in (against, *others):
            judge.require_replayable(space.parse(text), item)
    warn(workers)
    with _resumable(out) as study:
        open_study(study, question, [against, *others])
        _try_policies(study, question, minutes, trials, workers, quiet)
        _conclude(out, question, list(judging.values()), others, keep, workers, quiet)


def _open_traces(paths: list[str]) -> dict[str, Trace]:
    """Open traces, by what they hold: a copy of a trace counts once."""
    from traces.store import find_traces, open_trace

    return {own.trace_id: own for own in map(open_trace, find_traces(paths))}


def _require_searchable(
    searched: dict[str, Trace], judging: dict[str, Trace], metric: str, check: bool
) -> None:
    """Refuse traces on both sides, without a decode step, without what is asked of them, damaged or mixed."""
    from simulator.results.tables import require_one_model
    from traces.check import check_trace
    from traces.errors import MissingDataError, UserError

    for trace_id, own in judging.items():
        if trace_id in searched:
            raise UserError(
                f"--held-out has {own.path.name}, which policies are chosen on; allowed: other traces"
            )
    for own in [*searched.values(), *judging.values()]:
        if own.total_tokens == own.prompt_tokens:
            raise UserError(f"trace {own.path} has no decode step after its prompt; nothing to replay")
        if metric == SHIFT and not (own.has_values and own.has_sensitivity):
            raise MissingDataError(
                f"--metric is '{metric}', and trace {own.path} has no sensitivities; allowed: traces of "
                "sim record --sensitivity"
            )
        if check:
            check_trace(own)
    require_one_model(own.model for own in [*searched.values(), *judging.values()])


@contextmanager
def _resumable(out: Path) -> Iterator[Path]:
    """Keep other searches out of a folder, and say on Ctrl-C how to go on; gives the file of the study."""
    from traces.errors import Interrupted, UserError
    from traces.lock import locked

    out.mkdir(parents=True, exist_ok=True)
    study = out / "study.db"
    try:
        # Two searches in one folder would end each other's trials.
        with locked(out, wait=False):
            yield study
    except BlockingIOError:
        raise UserError(
            f"--out {out}: another search runs there; allowed: another folder, or later"
        ) from None
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: run the same command again, it goes on with {study}") from None


def _try_policies(
    study: Path, question: Question, minutes: float, trials: int | None, workers: int, quiet: bool
) -> None:
    """Search for some minutes, and show how long is left and what was tried."""
    from simulator.search.study import count_trials
    from simulator.search.workers import search_together

    started = last = time.time()
    with progress("searching, minutes", minutes, quiet) as show:

        def look() -> None:
            nonlocal last
            # Counting reads the file: not where nobody sees it, and not at every moment.
            if shows_progress(quiet) and time.time() - last > 1:
                last = time.time()
                told = ", ".join(f"{count} {name}" for name, count in count_trials(study).items())
                show(completed=(last - started) / 60, told=told)

        search_together(study, question, workers, started + 60 * minutes, trials, look)


def _conclude(
    out: Path, question: Question, judged_on: list[Any], others: list[str], keep: int, jobs: int, quiet: bool
) -> None:
    """Choose by the search's traces, judge by the others, print and write both."""
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
    print(f"wrote {out / 'winners.json'}, for sim validate live --configs", file=sys.stderr)
