"""Where tasks run: processes of this machine, or a Dask or Ray cluster; all by joblib."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from queue import Empty, SimpleQueue
from typing import Any

from joblib import Parallel, delayed, parallel_config, register_parallel_backend
from joblib.externals.loky import reusable_executor

from simulator.workers.interrupts import held_back
from traces.errors import UserError
from traces.extras import require_extra

_ALLOWED = "local, dask://HOST:PORT, ray (running on this machine) or ray://HOST:PORT"
_ADDRESS = re.compile(r"(dask|ray)://([^/\s]+)")
_WATCH_SECONDS = 1.0
_LEAVE_SECONDS = 5.0
_MOMENT_SECONDS = 0.1
# Tells of every task that cannot be handed to workers that are being taken away.
_LOG = logging.getLogger("concurrent.futures")


@dataclass(frozen=True)
class Engine:
    """Where a sweep runs.

    Attributes
    ----------
    kind : str
        ``local``, ``dask`` or ``ray``.
    address : str
        Of the cluster, in its own words.
    """

    kind: str = "local"
    address: str = ""


@dataclass(frozen=True)
class Workers:
    """Workers at hand.

    Attributes
    ----------
    n_workers : int
    run : callable
        Calls a function on each of many contents, and yields what it returns as it comes, in any order.
    """

    n_workers: int
    run: Callable[[Callable[[bytes], Any], Iterable[bytes]], Iterator[Any]]


def parse_engine(text: str) -> Engine:
    """Read ``--engine``.

    Raises
    ------
    UserError
    """
    if text == "local":
        return Engine()
    if text == "ray":
        return Engine("ray", "auto")
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise UserError(f"--engine is '{text}'; allowed: {_ALLOWED}")
    kind, address = found.groups()
    if kind == "dask":
        return Engine(kind, f"tcp://{address}")
    return Engine(kind, address if address == "auto" else text)


@contextmanager
def connected(engine: Engine, jobs: int) -> Iterator[Workers]:
    """Connect to the workers of an engine; they are let go, and their work is dropped, at the end.

    Parameters
    ----------
    engine : Engine
    jobs : int
        Processes of this machine; a cluster has its own number.

    Raises
    ------
    UserError
        If a package is missing, or no cluster answers.
    """
    with ExitStack() as stack:
        if engine.kind == "dask":
            yield _on_dask(engine.address, stack)
        elif engine.kind == "ray":
            yield _on_ray(engine.address, stack)
        elif jobs == 1:
            yield Workers(1, lambda function, contents: (function(content) for content in contents))
        else:
            # Each worker's BLAS in one thread: sums are cut alike whatever the number of workers.
            options = {"inner_max_num_threads": 1, "initializer": _live_with, "initargs": (os.getpid(),)}
            stack.callback(_end_processes)
            yield _joblib(jobs, _end_processes, backend="loky", **options)


def _joblib(n_workers: int, end: Callable[[], object], **config: Any) -> Workers:
    """Have joblib run in a thread of its own; ``end`` takes its workers away before it is done.

    Ctrl-C lands in the main thread, and joblib does not bear it at any moment: semaphores leak, threads and
    results are left. In its own thread it only ever learns that its workers are gone.
    """

    def run(function: Callable[[bytes], Any], contents: Iterable[bytes]) -> Iterator[Any]:
        came: SimpleQueue[tuple[str, Any]] = SimpleQueue()

        def work() -> None:
            try:
                with held_back(), parallel_config(**config):
                    parallel = Parallel(n_jobs=n_workers, return_as="generator_unordered", batch_size=1)
                    for result in parallel(delayed(function)(content) for content in contents):
                        came.put(("result", result))
                came.put(("end", None))
            except BaseException as error:
                came.put(("error", error))

        thread = threading.Thread(target=work, name="joblib", daemon=True)
        try:
            thread.start()
            while (item := _next(came))[0] == "result":
                yield item[1]
            if item[0] == "error":
                raise item[1]
        finally:
            _LOG.disabled = True
            until = time.monotonic() + _LEAVE_SECONDS
            thread.join(_MOMENT_SECONDS)  # it has nothing left to do, unless this is an early end
            while thread.is_alive() and time.monotonic() < until:
                end()  # again, if it was just starting its workers
                thread.join(_MOMENT_SECONDS)
            _LOG.disabled = False

    return Workers(n_workers, run)


def _next(came: SimpleQueue[tuple[str, Any]]) -> tuple[str, Any]:
    while True:
        try:
            # On Windows Ctrl-C is only felt between waits.
            return came.get(timeout=_WATCH_SECONDS)
        except Empty:
            continue


def _end_processes() -> None:
    # Not by get_reusable_executor: in place of one whose worker died it would start another.
    executor = reusable_executor._executor
    if executor is not None:
        executor.shutdown(wait=True, kill_workers=True)


def _on_dask(address: str, stack: ExitStack) -> Workers:
    distributed = _required("distributed", "dask")
    try:
        _require_listener(address)
        client = distributed.Client(address, timeout=10, set_as_default=False)
    except OSError:
        raise UserError(f"--engine: no Dask scheduler answers at {address}") from None
    stack.callback(client.close)
    n_workers = sum(client.ncores().values())
    if not n_workers:
        raise UserError(f"--engine: the Dask scheduler at {address} has no worker; allowed: one or more")
    return _joblib(n_workers, client.close, backend="dask", client=client)


def _on_ray(address: str, stack: ExitStack) -> Workers:
    ray = _required("ray", "ray")
    end: Callable[[], object] = _leave_alone
    if not ray.is_initialized():
        try:
            _require_listener(os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise UserError(f"--engine: no Ray answers at {address}: {reason}") from None
        end = ray.shutdown
        stack.callback(end)
    backend = import_module("ray.util.joblib.ray_backend").RayBackend
    # Its pool calls back from a thread for every result, all that a generator asks for; joblib only lacks
    # the word, which its parent class takes back for the sake of forked processes.
    register_parallel_backend("ray", type("RayResults", (backend,), {"supports_return_generator": True}))
    return _joblib(int(ray.cluster_resources().get("CPU", 1)), end, backend="ray")


def _require_listener(address: str) -> None:
    """Knock first, where the address says at which door: Ray itself would wait for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()


def _leave_alone() -> None:
    """Let a cluster be that somebody else has started."""


def _required(package: str, engine: str) -> Any:
    require_extra(f"--engine {engine}", package)
    return import_module(package)


def _live_with(parent: int) -> None:
    """Have a worker leave Ctrl-C to its parent, and end when that is gone, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
