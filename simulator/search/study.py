"""The search itself: an Optuna study on disk, which any number of processes add trials to."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from simulator.cells import code_version
from simulator.policies.wave import Wave
from simulator.results.metric_names import SHIFT
from simulator.search.judge import RUNGS, Judge, Worth, in_turns
from simulator.search.space import Space
from traces.documents import digest, parse_json
from traces.errors import UserError
from traces.store import open_trace

_NAME = "kvbudget"
_STARTUP_TRIALS = 24
# Share of the trials of a rung that go on to the next; twice that of those that none dominates.
_PROMOTED = 1 / 3


@dataclass(frozen=True)
class Question:
    """What a search asks: policies of a space that beat a base policy by a metric, on traces (by path)."""

    traces: tuple[str, ...]
    metric: str
    base: str
    space: Space
    waves: dict[str, Wave]
    seed: int

    def judge(self) -> Judge:
        """Open the traces."""
        base = self.space.parse(self.base)
        opened = in_turns([open_trace(path) for path in self.traces])
        return Judge(opened, self.metric, base, waves=self.waves, seed=self.seed)

    def _identity(self, path: str) -> str:
        """Tell traces apart by all that the metric is made from: an id leaves sensitivities out."""
        trace = open_trace(path)
        if self.metric != SHIFT or trace.manifest.sensitivity is None:
            return trace.trace_id
        files = trace.manifest.sensitivity["files"]
        return f"{trace.trace_id} {digest({name: own['sha256'] for name, own in files.items()})}"

    def digest(self) -> str:
        """Write down all that the trials of one study must have in common."""
        return json.dumps(
            {
                "traces": sorted(self._identity(path) for path in self.traces),
                "metric": self.metric,
                "base": self.space.parse(self.base).parameters_json,
                "parts": {role: list(names) for role, names in self.space.parts.items()},
                "budgets": list(self.space.budgets),
                "fixed": dict(self.space.fixed),
                "ranges": {name: asdict(own) for name, own in self.space.ranges.items()},
                "waves": {model: asdict(wave) for model, wave in self.waves.items()},
                "seed": self.seed,
                "rungs": [[str(share) for share in rung] for rung in RUNGS],
                "code": code_version(),
            },
            sort_keys=True,
        )


@dataclass(frozen=True)
class Tried:
    """A policy that was judged on all traces of the search."""

    policy: str
    budget: str
    worth: Worth


def open_study(path: Path, question: Question, starts: Sequence[str]) -> None:
    """Make or reopen a study; ``starts`` are policies to try first, as far as they lie in the space.

    Raises UserError if the file holds another search.
    """
    _silence()
    try:
        study = optuna.create_study(
            storage=_storage(path), study_name=_NAME, directions=["minimize", "minimize"], load_if_exists=True
        )
    except Exception as error:
        raise UserError(
            f"{path} is no study of a search: {type(error).__name__}; allowed: another --out"
        ) from None
    known = study.user_attrs.get("question")
    if known is None:
        study.set_user_attr("question", question.digest())
        for text in starts:
            for budget in question.space.budgets:
                found = question.space.coordinates(text, budget)
                if found is not None:
                    study.enqueue_trial(found, skip_if_exists=True)
    elif known != question.digest():
        before, now = (parse_json(text, str(path), dict[str, Any]) for text in (known, question.digest()))
        other = next(name for name in now if now[name] != before.get(name))
        raise UserError(f"{path} holds a search with other {other}; allowed: the same, or another --out")
    # Trials of a run that was killed are over.
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def search(
    path: Path,
    question: Question,
    worker: int,
    deadline: float,
    n_trials: int | None,
    on_trial: Callable[[], None] = lambda: None,
) -> None:
    """Add trials until ``deadline`` (``time.time()``), or until the study has ``n_trials``."""
    _silence()
    # Trials of another process that are under way count as bad, so that two do not try the same.
    sampler = optuna.samplers.TPESampler(
        seed=(question.seed + worker) % 2**32,  # as many as Optuna takes
        n_startup_trials=_STARTUP_TRIALS,
        multivariate=True,
        group=True,
        constant_liar=True,
    )
    study = optuna.load_study(study_name=_NAME, storage=_storage(path), sampler=sampler)
    judge = question.judge()
    while time.time() < deadline and (n_trials is None or _n_begun(study) < n_trials):
        # Two processes that begin at once may take the same start: the first to finish counts.
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            _try(study, judge, question.space)
        on_trial()


def _try(study: optuna.Study, judge: Judge, space: Space) -> None:
    trial = study.ask()
    policy, budget = space.suggest(trial)
    trial.set_user_attr("policy", policy)
    trial.set_user_attr("budget", budget)
    try:
        worths = _climb(study, judge, partial(judge.worth, space.parse(policy), budget), budget)
    except UserError as error:
        # A budget may be infeasible, or parameters not go together.
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
    else:
        trial.set_user_attr("worths", [asdict(worth) for worth in worths])
        study.tell(trial, [judge.sign * worths[-1].metric, worths[-1].memory], skip_if_finished=True)


def count_trials(path: Path) -> dict[str, int]:
    """Count the trials of a study: ``judged``, of these ``whole`` on all traces, and ``failed``."""
    trials = _load(path).get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return {
        "judged": len(done),
        "whole": sum(len(trial.user_attrs["worths"]) == len(RUNGS) for trial in done),
        "failed": sum(trial.state == TrialState.FAIL for trial in trials),
    }


def whole_trials(path: Path) -> list[Tried]:
    """List the policies that were judged on all traces, each once, in the order they were tried."""
    found = {
        (own["policy"], own["budget"]): Worth(**own["worths"][-1])
        for own in (trial.user_attrs for trial in _completed(_load(path)))
        if len(own["worths"]) == len(RUNGS)
    }
    return [Tried(policy, budget, worth) for (policy, budget), worth in found.items()]


def _climb(study: optuna.Study, judge: Judge, measure: Callable[[int], Worth], budget: str) -> list[Worth]:
    """Judge rung by rung: those that none dominates go on, and the next best, while there is room."""
    worths: list[Worth] = []
    for rung in range(len(RUNGS)):
        worths.append(measure(rung))
        rivals = [
            [Worth(**own) for own in trial.user_attrs["worths"]]
            for trial in _completed(study)
            if trial.user_attrs["budget"] == budget and len(trial.user_attrs["worths"]) > rung
        ]
        room = _PROMOTED * len(rivals)
        better = sum(rival[rung].dominates(worths[-1], judge.sign) for rival in rivals)
        n_promoted = sum(len(rival) > rung + 1 for rival in rivals)
        # Memory always differs a little, so that many are dominated by none.
        if better > room or n_promoted > (room if better else 2 * room):
            break
    return worths


def _completed(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _n_begun(study: optuna.Study) -> int:
    # Those to begin with wait for their turn.
    waiting = (TrialState.WAITING,)
    return len(study.get_trials(deepcopy=False)) - len(study.get_trials(deepcopy=False, states=waiting))


def _load(path: Path) -> optuna.Study:
    return optuna.load_study(study_name=_NAME, storage=_storage(path))


def _storage(path: Path) -> str:
    return f"sqlite:///{path.absolute()}"


def _silence() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Parts of the sampler may change with Optuna's versions, which is no news to a user.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
