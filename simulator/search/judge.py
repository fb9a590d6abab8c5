"""What a policy is worth on the traces of a search, cheaply first: against a base policy, trace by trace."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from simulator.budget import parse_budget
from simulator.cells import PreparedTrace
from simulator.engine.sampling import EVERYTHING, Sampling
from simulator.policies.language import Policy
from simulator.policies.wave import Wave
from simulator.results.metric_names import COMPARED
from traces.errors import UserError
from traces.trace import Trace

# Share of the traces, and of their decode steps, that a policy is judged on before the next rung.
RUNGS = ((Fraction(1, 4), Fraction(1, 4)), (Fraction(1, 2), Fraction(1, 2)), (Fraction(1), Fraction(1)))
# What the full cache attends to, of as many traces as fit; the others are looked at again.
_PREPARED_BYTES = 10**9
# What only the whole tells: it is judged on fewer traces first, but on all of their steps.
_WHOLE_ONLY = ("lost_lookup_peak",)


@dataclass(frozen=True)
class Worth:
    """Estimates for all traces of a search; ``memory`` is the mean bytes of the cache."""

    metric: float
    memory: float

    def dominates(self, other: Worth, sign: int) -> bool:
        """Say whether it is better in one and no worse in the other; ``sign`` is 1 if less is better."""
        own, others = (sign * self.metric, self.memory), (sign * other.metric, other.memory)
        return own != others and own[0] <= others[0] and own[1] <= others[1]


class Judge:
    """Replays policies on the traces of a search, ordered by `in_turns`.

    Of a part of the traces only the difference to the base policy counts, added to what the base is worth on
    all: traces differ more than policies do, and a low rung then tells nearly what the highest would.
    """

    def __init__(
        self, traces: Sequence[Trace], metric: str, base: Policy, *, waves: dict[str, Wave], seed: int
    ) -> None:
        self.traces, self._metric, self._base = traces, metric, base
        self._waves, self._seed = waves, seed
        self._prepared: OrderedDict[tuple[int, Sampling], PreparedTrace] = OrderedDict()
        self._known: dict[tuple[str, int], np.ndarray] = {}

    @property
    def sign(self) -> int:
        """1 if less of the metric is better, else -1."""
        return -1 if COMPARED[self._metric].more_is_better else 1

    def worth(self, policy: Policy, budget: str, rung: int) -> Worth:
        """Estimate a policy's worth from the traces and steps of a rung, -1 for the highest.

        Raises UserError if it cannot be replayed.
        """
        rung %= len(RUNGS)
        own, base = self._measured(policy, budget, rung), self._of_base(budget, rung)
        whole = self._of_base(budget, len(RUNGS) - 1).mean(axis=0)
        return Worth(
            metric=float(whole[0] + (own[:, 0] - base[:, 0]).mean()),
            memory=float(whole[1] * own[:, 1].mean() / base[:, 1].mean()),
        )

    def require_replayable(self, policy: Policy, budget: str) -> None:
        """Raise UserError, before any work is done, if a policy cannot be replayed on the first trace."""
        self._measured(policy, budget, 0, n_most=1)

    def worth_of_base(self, budget: str) -> Worth:
        """Give what the base policy is worth on all traces."""
        metric, memory = self._of_base(budget, len(RUNGS) - 1).mean(axis=0)
        return Worth(float(metric), float(memory))

    def _of_base(self, budget: str, rung: int) -> np.ndarray:
        if (budget, rung) not in self._known:
            self._known[budget, rung] = self._measured(self._base, budget, rung)
        return self._known[budget, rung]

    def _measured(self, policy: Policy, budget: str, rung: int, n_most: int | None = None) -> np.ndarray:
        """Replay some traces; float64 (n_traces, 2): metric and mean bytes."""
        n_traces, queries = RUNGS[rung]
        sampling = EVERYTHING if self._metric in _WHOLE_ONLY else Sampling(queries)
        found = []
        for index in range(max(1, round(n_traces * len(self.traces))))[:n_most]:
            prepared = self._prepare(index, sampling)
            cell = prepared.replay(policy, parse_budget(budget), seed=self._seed, waves=self._waves)
            if cell.exit_code:
                refused = UserError(f"{policy.name} at {budget}: {cell.row['error']}")
                refused.exit_code = cell.exit_code
                raise refused
            found.append((cell.row[self._metric], cell.row["bytes_mean"]))
        return np.array(found, np.float64)

    def _prepare(self, index: int, sampling: Sampling) -> PreparedTrace:
        key = index, sampling
        if key not in self._prepared:
            while sum(own.n_bytes for own in self._prepared.values()) > _PREPARED_BYTES:
                self._prepared.popitem(last=False)
            prepared = PreparedTrace(self.traces[index], sampling=sampling, seed=self._seed, oracle=False)
            self._prepared[key] = prepared
        self._prepared.move_to_end(key)
        return self._prepared[key]


def in_turns(traces: Sequence[Trace]) -> list[Trace]:
    """Order traces so that families take turns: each part of the list has some of every family."""
    families: dict[str | None, list[Trace]] = {}
    for trace in traces:
        families.setdefault(trace.manifest.task.get("family"), []).append(trace)
    longest = max(map(len, families.values()), default=0)
    return [own[i] for i in range(longest) for own in families.values() if i < len(own)]
