"""The door: one cell per trace, policy and budget; all cells to one table."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl

from simulator.budget import PEAK, Budget, parse_budget
from simulator.engine.cap import entries_of, under_budget
from simulator.engine.full_cache import FullCache
from simulator.engine.layer import Retained
from simulator.engine.loop import Engine
from simulator.engine.metrics import measure
from simulator.engine.paged import BLOCK, require_block
from simulator.engine.request import Outcome, Request
from simulator.engine.sampling import EVERYTHING, Sampling
from simulator.engine.shift import Sensitivities
from simulator.engine.trajectory import spans
from simulator.policies.language import Policy, parse_policy, split_list
from simulator.policies.parts import PolicyError
from simulator.policies.plugins import failure
from simulator.policies.wave import Wave, known_waves, read_wave, require_fitting
from simulator.results.calibration import Calibration, known_calibrations, predicted_divergence
from simulator.results.tables import budget_columns, result_table, retained_table, trajectory_table
from traces.check import check_trace
from traces.errors import UserError
from traces.seeds import require_seed
from traces.store import find_traces, open_trace
from traces.trace import Trace
from traces.version import package_version

_ROOT = Path(__file__).parents[1]
_MAKES_ROWS = (
    *(f"simulator/{room}/**/*.py" for room in ("kernels", "policies", "engine")),
    *("simulator/waves/*.json", "simulator/budget.py", "simulator/cells.py", "traces/**/*.py"),
    *("simulator/results/calibration.py", "simulator/results/calibrations/*.json"),
)


@dataclass(frozen=True, slots=True)
class Replay:
    """Results of a replay.

    Attributes
    ----------
    table : polars.DataFrame
        One row per trace, policy and budget; columns of ``results.ROW_SCHEMA``.
    retained : polars.DataFrame
        Who is retained after every compression, ``results.RETAINED_SCHEMA``; empty unless asked for.
    trajectory : polars.DataFrame
        Budgets and mass between compressions, ``results.TRAJECTORY_SCHEMA``; empty unless asked for.
    exit_code : int
        0 if every cell succeeded, 1 if some failed, the first failure's own code if all did.
    """

    table: pl.DataFrame
    retained: pl.DataFrame
    trajectory: pl.DataFrame
    exit_code: int


@dataclass(slots=True, eq=False)
class Cell:
    """One trace, policy and budget.

    Attributes
    ----------
    labels : dict
        What tells it apart in the tables beside the results.
    row : dict
        Columns of ``results.ROW_SCHEMA``.
    budget : Budget
    retained : list of Retained
    trajectory : polars.DataFrame or None
    exit_code : int
        0, or the code of what went wrong.
    """

    labels: dict[str, Any]
    row: dict[str, Any]
    budget: Budget
    retained: list[Retained] = field(default_factory=list)
    trajectory: pl.DataFrame | None = None
    exit_code: int = 0


# Of a trace: more are a day's work, and a typing error more likely.
MOST_CELLS = 10**5


def replay(
    traces: Sequence[str | Path | Trace] | str | Path | Trace,
    policies: Sequence[str | Policy] | str | Policy,
    budgets: Sequence[str | int | Budget] | str | int | Budget,
    **options: Any,
) -> pl.DataFrame:
    """Replay every policy on every trace at every budget; see ``run_replay`` for the options.

    Returns
    -------
    polars.DataFrame
        One row per trace, policy and budget. Cells that failed say so in ``status`` and ``error``.

    Raises
    ------
    UserError
        For a policy or budget that cannot be read, or a trace that cannot be opened.
    """
    named = [
        p for text in _as_list(policies) for p in (split_list(text) if isinstance(text, str) else [text])
    ]
    asked = [b for text in _as_list(budgets) for b in (text.split(",") if isinstance(text, str) else [text])]
    return run_replay(_as_list(traces), named, asked, **options).table


def run_replay(
    traces: Sequence[str | Path | Trace],
    policies: Sequence[str | Policy],
    budgets: Sequence[str | int | Budget],
    *,
    seed: int = 0,
    jobs: int = 1,
    waves: str | Path | Iterable[str | Path] = (),
    calibrations: str | Path | Iterable[str | Path] = (),
    keep_retained: bool = False,
    keep_trajectory: bool = False,
    sampling: Sampling = EVERYTHING,
    check: bool = True,
    block: int = BLOCK,
    on_cell: Callable[[], None] = lambda: None,
) -> Replay:
    """Replay the product of traces, policies and budgets.

    Parameters
    ----------
    traces : sequence of opened traces, paths, folders of traces or globs
    policies : sequence of names or policies
    budgets : sequence
        Entries per KV head (int or ``"128"``), ``"5%"`` or ``"64MiB"``; with ``!`` a cap on the peak, with
        ``+prompt`` on top of a prompt that is kept.
    seed : int
        For policies that draw at random.
    jobs : int
        Threads over layers.
    waves : iterable of paths
        Demand profiles beside those that ship with the package.
    calibrations : iterable of paths
        What shifts of predictions are in divergence, beside those that ship with the package.
    keep_retained : bool
        Keep who is retained after every compression.
    keep_trajectory : bool
        Keep how budgets and mass went on over time.
    sampling : Sampling
        How much is measured; the policies decide from everything.
    check : bool
        Check every trace whole (checksums, finiteness, log-sum-exps) before it is replayed.
    block : int
        Tokens of a block of a paged cache, for ``bytes_paged_mean``.
    on_cell : callable
        Called after every finished cell, for progress.
    """
    require_seed(seed)
    require_block(block)
    if jobs < 1:
        raise UserError(f"jobs is {jobs}; allowed: 1 or more")
    if keep_trajectory and sampling != EVERYTHING:
        raise UserError(
            f"a trajectory is of every decode step, and only {sampling} is measured; allowed: either"
        )
    # A policy or budget that is asked twice, in whatever words, is replayed once.
    parsed = list(dict.fromkeys(parse_policy(policy) for policy in policies))
    asked = list(dict.fromkeys(parse_budget(budget) for budget in budgets))
    if len(parsed) * len(asked) > MOST_CELLS:
        raise UserError(
            f"{len(parsed)} policies at {len(asked)} budgets are {len(parsed) * len(asked)} cells a trace; "
            f"allowed: at most {MOST_CELLS}"
        )
    # Every trace is opened before the first is replayed, so that a bad one costs no work.
    opened: list[Trace] = []
    for given in traces:
        opened += [given] if isinstance(given, Trace) else map(open_trace, find_traces([given]))
    for trace in opened:
        if trace.total_tokens == trace.prompt_tokens:
            raise UserError(f"trace {trace.path} has no decode step after its prompt; nothing to replay")
        sampling.draw(trace, seed)
        if check:
            check_trace(trace)
    if not opened or not parsed or not asked:
        raise UserError("a replay needs at least one trace, one policy and one budget")
    known = known_waves(_as_list(waves))
    measured = {wave.model: wave for wave in map(read_wave, _as_list(waves))}
    calibrated = known_calibrations(_as_list(calibrations))
    for trace in opened:
        require_fitting(measured, trace.model, trace.shape)
    cells = []
    for trace in opened:
        with trace.mapped():
            prepared = PreparedTrace(
                trace, jobs=jobs, sampling=sampling, seed=seed, calibrations=calibrated, block=block
            )
            for policy, budget in product(parsed, asked):
                cells.append(
                    prepared.replay(
                        policy,
                        budget,
                        seed=seed,
                        waves=known,
                        keep_retained=keep_retained,
                        keep_trajectory=keep_trajectory,
                    )
                )
                on_cell()
    failed = [cell.exit_code for cell in cells if cell.exit_code]
    return Replay(
        result_table(cell.row for cell in cells),
        retained_table((cell.labels, cell.retained) for cell in cells),
        pl.concat([trajectory_table({}, []), *(c.trajectory for c in cells if c.trajectory is not None)]),
        0 if not failed else failed[0] if len(failed) == len(cells) else 1,
    )


class PreparedTrace:
    """A trace whose full cache is measured once, for any number of policies and budgets.

    Parameters
    ----------
    trace : Trace
    jobs : int
        Threads.
    sampling : Sampling
        How much of it is measured.
    seed : int
        For the sample.
    oracle : bool
        Whether rows get the oracle and the gap to it, which take memory.
    calibrations : mapping of str to Calibration, optional
        By model; without it those that ship with the package.
    block : int
        Tokens of a block of a paged cache.

    Raises
    ------
    UserError
        If the trace has fewer steps, layers or heads than are to be measured.
    """

    def __init__(
        self,
        trace: Trace,
        *,
        jobs: int = 1,
        sampling: Sampling = EVERYTHING,
        seed: int = 0,
        oracle: bool = True,
        calibrations: Mapping[str, Calibration] | None = None,
        block: int = BLOCK,
    ) -> None:
        self.trace, self._jobs, self._sampling, self._block = trace, jobs, sampling, block
        sample = sampling.draw(trace, seed)
        self._full = FullCache(trace, jobs, sample, oracle=oracle)
        is_told = trace.has_sensitivity and trace.has_values and sample.has_every_head
        self._sensitivities = Sensitivities(trace, sample) if is_told else None
        self._calibrations = known_calibrations() if calibrations is None else calibrations

    @property
    def n_bytes(self) -> int:
        """Memory that is kept of the full cache."""
        beside = 0 if self._sensitivities is None else self._sensitivities.n_bytes
        return self._full.strongest.nbytes + self._full.largest.nbytes + beside

    def replay(
        self,
        policy: Policy,
        budget: Budget,
        *,
        seed: int,
        waves: dict[str, Wave],
        keep_retained: bool = False,
        keep_trajectory: bool = False,
    ) -> Cell:
        """Replay one cell; what goes wrong in it by a user's or a policy's fault stands in its row."""
        trace = self.trace
        labels = cell_labels(trace, policy, budget)
        facts = {
            "family": trace.manifest.task.get("family"),
            "model": trace.model,
            "code_version": code_version(),
            "sampling": str(self._sampling) or None,
        }
        cell = Cell(labels, labels | facts, budget)
        started = time.perf_counter()
        try:
            entries = entries_of(budget, policy, trace.shape, trace.prompt_tokens, trace.total_tokens)
            request = Request(
                trace,
                under_budget(policy, budget),
                entries,
                seed=seed,
                waves=waves,
                keep_retained=keep_retained,
                sample=self._full.sample,
                sensitivities=self._sensitivities,
            )
            (outcome,) = Engine([request], self._jobs).run()
            _require_capped(budget, policy, trace, outcome)
            cell.row |= asdict(measure(trace, outcome, self._full, self._block)) | {"block": self._block}
            cell.row["control"] = _control(policy, outcome)
            shift = cell.row["shift_mean"]
            cell.row["predicted_kl"] = predicted_divergence(trace, shift, self._calibrations)
            cell.row |= {"budget_entries": entries, "protection_binding": outcome.protection_binding}
            cell.row["status"] = "ok"
            cell.retained = outcome.retained
            if keep_trajectory:
                cell.trajectory = trajectory_table(labels, spans(trace, outcome))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a user's part raises
            told = error if isinstance(error, UserError) else failure(policy.parts.values(), error)
            if told is None:
                raise
            cell.row |= {"status": "error", "error": " ".join(str(told).split())}
            cell.exit_code = told.exit_code
        cell.row["seconds"] = time.perf_counter() - started
        return cell


def _control(policy: Policy, outcome: Outcome) -> str | None:
    """Say why a row tells nothing of its policy: nothing was evicted, or nothing that anyone looked at."""
    if not policy.evicts:
        return "full cache"
    if not outcome.n_evicted:
        return "nothing evicted"
    return "nothing lost" if outcome.mass.min() == 1 else None


def _require_capped(budget: Budget, policy: Policy, trace: Trace, outcome: Outcome) -> None:
    """Refuse rows of a part that held more than it said it would; parts of the package cannot."""
    most, held = int(budget.of_cache(trace.shape, trace.total_tokens)), int(outcome.held.max())
    if budget.kind == PEAK and policy.evicts and held > most:
        raise PolicyError(
            f"policy '{policy.name}' held {held} entries under a cap of {most}; allowed: a trigger whose "
            "most_added tells all that it adds"
        )


def cell_labels(trace: Trace, policy: Policy, budget: Budget) -> dict[str, Any]:
    """Give what tells a cell apart: the columns that every table of it shares."""
    return {
        "trace_id": trace.trace_id,
        "trace": trace.path.name,
        "policy": policy.name,
        "policy_params": policy.parameters_json,
        **budget_columns(budget),
    }


@cache
def code_version() -> str:
    """Name this build: the version and a digest of the code and waves that rows depend on.

    Reports, charts and commands are left out, so that what is finished stays finished when they change.
    """
    digest = hashlib.sha256()
    for pattern in _MAKES_ROWS:
        for path in sorted(_ROOT.glob(pattern)):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    return f"{package_version()}+{digest.hexdigest()[:12]}"


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
