"""What this machine can do and what a process holds: the rates that a replay's time is compared with."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event, Thread

import numpy as np

from simulator.kernels.attention import add_tile_often
from simulator.kernels.tiles import ROWS, WIDTH

# The replay's own products, (rows x 128) @ (128 x columns): queries of a span and what a KV head retains.
_HEAD_DIM, _ENTRIES = 128, 1152
_SHAPES = ((512, _ENTRIES), (2048, _ENTRIES), (_ENTRIES, 512), (_ENTRIES, 2048))
_TIMES = 1000
_STATUS = Path("/proc/self/status")


def sgemm_rate(n_threads: int, seconds: float = 0.1) -> float:
    """Measure single-precision products, each thread at its own; the best of a few shapes.

    Parameters
    ----------
    n_threads : int
        Threads that multiply at the same time.
    seconds : float
        How long each shape is measured.

    Returns
    -------
    float
        GFLOP/s of all threads together.
    """
    return max(_sgemm_rate(*sizes, n_threads, seconds) for sizes in _SHAPES)


def _sgemm_rate(n_rows: int, n_columns: int, n_threads: int, seconds: float) -> float:
    barrier = Barrier(n_threads)

    def multiply(seed: int) -> float:
        rng = np.random.default_rng(seed)
        left = rng.standard_normal((n_rows, _HEAD_DIM), np.float32)
        right = rng.standard_normal((n_columns, _HEAD_DIM), np.float32)
        products = left @ right.T
        barrier.wait()
        n_products, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            np.matmul(left, right.T, out=products)
            n_products += 1
        return n_products * 2e-9 * n_rows * _HEAD_DIM * n_columns / passed

    with ThreadPoolExecutor(n_threads) as pool:
        return sum(pool.map(multiply, range(n_threads)))


def exp_time(seconds: float = 0.1) -> float:
    """Measure one logit's scale, exp and sum in the replay's own loop, one thread; ns."""
    rng = np.random.default_rng(0)
    tile = rng.standard_normal((ROWS, WIDTH), np.float32)
    lse, mass = np.full(WIDTH, 8, np.float32), np.zeros(WIDTH, np.float32)
    best = _best_time(lambda: add_tile_often(tile, np.float32(0.1), lse, mass, _TIMES), seconds)
    return best / (_TIMES * tile.size) * 1e9


def copy_rate(n_bytes: int = 2**28, seconds: float = 0.3) -> float:
    """Measure copying of memory far larger than the caches, one thread; GB read and written per second."""
    source = np.ones(n_bytes // 4, np.float32)
    target = np.empty_like(source)
    return 2 * n_bytes / _best_time(lambda: np.copyto(target, source), seconds) / 1e9


def _best_time(work: Callable[[], object], seconds: float) -> float:
    """Give the shortest time of one call, after a first that is not timed."""
    work()
    best, stop = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return float(best)


class PeakMemory:
    """Watch how much memory of its own the process holds, from entering to leaving the context.

    On Linux that is anonymous and shared memory, looked at every few milliseconds: pages of mapped files, a
    trace's above all, can be dropped at any time and do not count. `megabytes` then adds the mapped pages
    that are left, which are the program's libraries once the traces are closed. Elsewhere only the peak of
    the whole process is known, with everything in it.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self._interval = interval
        self._peak = 0
        self._stop = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def megabytes(self) -> float:
        """Give the peak in MB (10^6 bytes); call it when nothing needs a trace's arrays any more."""
        if not _STATUS.exists():
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
        # Maps end with the arrays that hold them, some of which are in reference cycles.
        gc.collect()
        return (self._peak + _held("RssFile")) / 1e6

    def _watch(self) -> None:
        while _STATUS.exists():
            self._peak = max(self._peak, _held("RssAnon", "RssShmem"))
            if self._stop.wait(self._interval):
                return


def _held(*names: str) -> int:
    """Add up fields of /proc/self/status, in bytes."""
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return sum(int(words[1]) * 1024 for words in lines if words and words[0].rstrip(":") in names)
