"""Where tasks run: processes of this machine, or a Dask or Ray cluster; all hand out futures."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from simulator.workers.processes import Workers, processes
from traces.errors import UserError
from traces.extras import require_extra

_ALLOWED = "local, dask://HOST:PORT, ray (running on this machine) or ray://HOST:PORT"
_ADDRESS = re.compile(r"(dask|ray)://([^/\s]+)")


@dataclass(frozen=True)
class Engine:
    """Where a sweep runs: ``local``, or on a ``dask`` or ``ray`` cluster, addressed in its own words."""

    kind: str = "local"
    address: str = ""


def parse_engine(text: str) -> Engine:
    """Read ``--engine``; raises UserError."""
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

    ``jobs`` are processes of this machine; a cluster has its own number. Raises UserError if a package is
    missing, or no cluster answers.
    """
    if engine.kind == "dask":
        at_hand = _on_dask(engine.address)
    elif engine.kind == "ray":
        at_hand = _on_ray(engine.address)
    else:
        at_hand = _here() if jobs == 1 else processes(jobs)
    with at_hand as workers:
        yield workers


@contextmanager
def _here() -> Iterator[Workers]:
    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done

    yield Workers(1, submit)


@contextmanager
def _on_dask(address: str) -> Iterator[Workers]:
    distributed = _required("distributed", "dask")
    try:
        _require_listener(address)
        client = distributed.Client(address, timeout=10, set_as_default=False)
    except OSError:
        raise UserError(f"--engine: no Dask scheduler answers at {address}") from None
    with client:
        n_workers = sum(client.ncores().values())
        if not n_workers:
            raise UserError(f"--engine: the Dask scheduler at {address} has no worker; allowed: one or more")
        yield Workers(n_workers, client.get_executor(pure=False).submit)


@contextmanager
def _on_ray(address: str) -> Iterator[Workers]:
    ray = _required("ray", "ray")
    is_ours = not ray.is_initialized()  # else somebody else has started it, and ends it
    if is_ours:
        try:
            _require_listener(os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise UserError(f"--engine: no Ray answers at {address}: {reason}") from None

    try:
        n_workers = int(ray.cluster_resources().get("CPU", 1))
        yield Workers(n_workers, lambda function, *given: ray.remote(function).remote(*given).future())
    finally:
        if is_ours:
            ray.shutdown()


def _require_listener(address: str) -> None:
    """Knock first, where the address says at which door: Ray itself would wait for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()


def _required(package: str, engine: str) -> Any:
    require_extra(f"--engine {engine}", package)
    return import_module(package)
