"""The cells of a sweep, each under the address of all that its row depends on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from simulator.budget import Budget
from simulator.cells import code_version
from simulator.engine.sampling import EVERYTHING, Sampling
from simulator.policies.language import Policy
from simulator.policies.wave import Wave, read_wave
from simulator.results.tables import budget_columns
from simulator.sweep.spec import Setting
from traces.documents import digest
from traces.errors import TraceError, UserError
from traces.manifest import Manifest
from traces.remote import find_remote, is_remote, remote_manifest
from traces.shape import ModelShape
from traces.store import find_traces, open_trace


@dataclass(frozen=True)
class SweepTrace:
    """A trace of a sweep, which workers will open for themselves.

    ``source`` is an absolute path or a URL, ``name`` is the trace's in rows. ``manifest_sha256`` is of all
    that is told of the trace, model and RoPE included, which rows depend on too; ``n_steps`` counts decode
    steps. ``error`` says why it cannot be replayed; the rest is empty if it could not even be opened.
    """

    source: str
    name: str
    trace_id: str = ""
    manifest_sha256: str = ""
    model: str = ""
    shape: ModelShape | None = None
    n_steps: int = 0
    n_bytes: int = 0
    error: UserError | None = None


@dataclass(frozen=True, slots=True)
class SweepCell:
    """One row to be: ``key`` is the sha256 of all it depends on, ``parameters`` are the policy's in JSON."""

    key: str
    policy: Policy
    parameters: str
    budget: Budget
    seed: int


@dataclass(frozen=True)
class TraceCells:
    """The cells of one trace."""

    trace: SweepTrace
    cells: tuple[SweepCell, ...]


def find_sweep_traces(patterns: Sequence[str]) -> list[SweepTrace]:
    """Find the traces of a sweep in the order asked, each content once.

    A trace that is there and cannot be opened stays in the list, with the reason. Raises TraceError if a
    pattern matches no trace, UserError if the package that a URL needs is not installed.
    """
    found: dict[str, SweepTrace] = {}
    for pattern in patterns:
        for trace in _found(pattern):
            found.setdefault(trace.trace_id or trace.source, trace)
    return list(found.values())


def lay_out(
    traces: Sequence[SweepTrace],
    settings: Sequence[Setting],
    wave_digests: Sequence[str],
    sampling: Sampling = EVERYTHING,
) -> list[TraceCells]:
    """Give every trace its cells, in the order of the settings."""
    parameters = {setting.policy: setting.policy.parameters_json for setting in settings}
    return [
        TraceCells(
            trace,
            tuple(
                SweepCell(
                    key=_address(trace, setting, parameters[setting.policy], wave_digests, sampling),
                    policy=setting.policy,
                    parameters=parameters[setting.policy],
                    budget=setting.budget,
                    seed=setting.seed,
                )
                for setting in settings
            ),
        )
        for trace in traces
    ]


def wave_digest(path: str) -> str:
    """Return the sha256 of a wave's content; raises MissingDataError if the file is no wave."""
    return digest(asdict(read_wave(path)))


def read_waves(paths: Sequence[str]) -> dict[str, Wave]:
    """Read the waves that a sweep gives, the last of a model counts."""
    return {wave.model: wave for wave in map(read_wave, paths)}


def _address(
    trace: SweepTrace, setting: Setting, parameters: str, wave_digests: Sequence[str], sampling: Sampling
) -> str:
    # Whatever else a row comes to depend on takes a line here.
    return digest(
        {
            "trace": trace.trace_id or trace.source,
            "manifest": trace.manifest_sha256,
            "policy": setting.policy.name,
            "parameters": parameters,
            "budget": list(budget_columns(setting.budget).values()),
            "seed": setting.seed,
            "waves": list(wave_digests),
            "sampling": str(sampling),
            "code": code_version(),
        }
    )


def _found(pattern: str) -> Iterator[SweepTrace]:
    if is_remote(pattern):
        for url in find_remote(pattern):
            yield _described(url, url.rpartition("/")[2], partial(remote_manifest, url))
    else:
        for path in find_traces([pattern]):
            yield _described(str(path.absolute()), path.name, partial(_manifest, path))


def _manifest(path: Path) -> Manifest:
    return open_trace(path).manifest


def _described(source: str, name: str, read: Callable[[], Manifest]) -> SweepTrace:
    error: UserError | None = None
    try:
        manifest = read()
    except TraceError as failed:
        return SweepTrace(source, name, error=failed)
    if manifest.total_tokens == manifest.prompt_tokens:
        error = UserError(f"trace {source} has no decode step after its prompt; nothing to replay")
    n_bytes = sum(record["size"] for record in manifest.all_files.values())
    signature = manifest.manifest_sha256 or digest(json.loads(manifest.to_json()), without="manifest_sha256")
    return SweepTrace(
        source=source,
        name=name,
        trace_id=manifest.trace_id,
        manifest_sha256=signature,
        model=manifest.model,
        shape=manifest.shape,
        n_steps=manifest.total_tokens - manifest.prompt_tokens,
        n_bytes=n_bytes,
        error=error,
    )
