"""The cells of a sweep, each under the address of all that its row depends on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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

    Attributes
    ----------
    source : str
        Absolute path, or URL.
    name : str
        What rows call it.
    trace_id : str
        Empty if it could not be opened.
    manifest_sha256 : str
        Of all that is told of it, model and RoPE included, which rows depend on too.
    model : str
    shape : ModelShape or None
    n_steps : int
        Decode steps.
    n_bytes : int
    error : UserError or None
        Why it cannot be replayed.
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
    """One row to be.

    Attributes
    ----------
    key : str
        sha256 of all that the row depends on.
    policy : Policy
    parameters : str
        The policy's, as one line of JSON.
    budget : Budget
    seed : int
    """

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

    A trace that is there and cannot be opened stays in the list, with the reason.

    Raises
    ------
    TraceError
        If a pattern matches no trace.
    UserError
        If what a URL needs is not installed.
    """
    found: dict[str, SweepTrace] = {}
    for pattern in patterns:
        for trace in _remote(pattern) if is_remote(pattern) else map(_local, find_traces([pattern])):
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
    """Name the content of a wave's file.

    Raises
    ------
    MissingDataError
        If it is no wave.
    """
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


def _local(path: Path) -> SweepTrace:
    source = str(path.absolute())
    try:
        return _of_manifest(source, path.name, open_trace(path).manifest)
    except TraceError as error:
        return SweepTrace(source, path.name, error=error)


def _remote(url: str) -> list[SweepTrace]:
    found = []
    for source in find_remote(url):
        name = source.rpartition("/")[2]
        try:
            found.append(_of_manifest(source, name, remote_manifest(source)))
        except TraceError as error:
            found.append(SweepTrace(source, name, error=error))
    return found


def _of_manifest(source: str, name: str, manifest: Manifest) -> SweepTrace:
    error = None
    if manifest.total_tokens == manifest.prompt_tokens:
        error = UserError(f"trace {source} has no decode step after its prompt; nothing to replay")
    n_bytes = sum(record["size"] for record in manifest.files.values())
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
