"""Change what is read from outside, again and again: ``python tests/tools/fuzz.py --mutations 10000``.

Whatever is read is refused in one line with the right exit code, or means what it should: nothing else, no
traceback, no hang, no memory beyond a gigabyte. Every kind of file is tried in a process of its own, so that
one which ends the process is noticed too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_kind import Target
from fuzz_targets import make_targets

from traces.errors import UserError
from validate.cli import main as cli

SECONDS = 20.0
MOST_MEGABYTES = 1000
EXIT_CODES = range(1, 7)


class Hang(BaseException):
    """A change that took too long."""


@dataclass
class Tally:
    """What became of the changes of one kind of file.

    Attributes
    ----------
    counts : Counter
        ``refused``, ``same`` (accepted, and means what it should), ``unverified`` (accepted with a word that
        its checksum is missing) or ``WRONG``.
    wrong : list of str
        What went wrong, with the number of the change.
    slowest, megabytes : float
        Seconds of the slowest change, and the peak of the process's memory.
    """

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    megabytes: float = 0.0


def fuzz(target: Target, numbers: range, seed: int, journal: Path | None = None) -> Tally:
    """Try the changes of these numbers; a number and the seed tell a change."""
    tally = Tally(target.name)
    for number in numbers:
        if journal is not None:
            journal.write_text(str(number))
        rng = random.Random(f"{seed} {target.name} {number}")
        started = time.perf_counter()
        try:
            content = target.change(target.sound, rng)
            target.path.write_bytes(content)
            with _time_limit():
                outcome = _outcome(target, content)
        except (Hang, Exception) as error:
            place = "".join(traceback.format_exception(error)[-3:]).replace("\n", " ")
            outcome = f"WRONG {type(error).__name__}: {place}"
        finally:
            target.restore()
        tally.slowest = max(tally.slowest, time.perf_counter() - started)
        tally.counts[outcome.split()[0]] += 1
        if outcome.startswith("WRONG"):
            tally.wrong.append(f"{target.name} {number}: {outcome[:1500]}")
    tally.megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return tally


def _outcome(target: Target, content: bytes) -> str:
    said, refused = "", None
    for command in target.commands:
        code, out, errors = run_sim(command)
        said += out + errors
        if code == 0:
            continue
        lines = errors.splitlines()
        if code not in EXIT_CODES:
            return f"WRONG exit code {code} of {command}: {errors}"
        if not lines or not all(line.startswith("sim: ") and len(line) < 2000 for line in lines):
            return f"WRONG words of {command}: {errors}"
        refused = errors
    try:
        with contextlib.redirect_stderr(io.StringIO()) as captured:
            found = target.meaning(target.path)
        said += captured.getvalue()
    except UserError as error:
        line = str(error)
        return "refused" if "\n" not in line and line.isprintable() else f"WRONG words: {line!r}"
    if "no checksum" in said or "cannot be verified" in said:
        return "unverified"
    try:
        expected = target.expected(content)
    except Exception as error:
        return f"WRONG accepted, though no {target.name}: {error!r}, found {found!r}"
    if found != expected:
        return f"WRONG meaning {found!r}, expected {expected!r}"
    return "refused" if refused else "same"


def run_sim(arguments: list[str]) -> tuple[int, str, str]:
    """Run one command in this process; exit code, standard output and standard error."""
    out, errors, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["sim", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
        return code, out.getvalue(), errors.getvalue()
    finally:
        sys.argv = before
    return 0, out.getvalue(), errors.getvalue()


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def end(*_: Any) -> None:
        raise Hang(f"more than {SECONDS:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _alone(name: str, numbers: range, seed: int, folder: Path, results: Any) -> None:
    """Fuzz one kind of file in this process and send its tally."""
    folder.mkdir(exist_ok=True)
    target = next(target for target in make_targets(folder) if target.name == name)
    results.put(fuzz(target, numbers, seed, folder.parent / f"{folder.name}.number"))


def _in_a_process(name: str, numbers: range, seed: int, folder: Path) -> Tally:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_alone, args=(name, numbers, seed, folder, results))
    process.start()
    while process.is_alive() and results.empty():
        process.join(0.1)
    if not results.empty():
        tally: Tally = results.get()
        process.join()
        return tally
    number = (folder.parent / f"{folder.name}.number").read_text()
    end = f"WRONG the process ended with {process.exitcode}"
    return Tally(name, Counter(WRONG=1), [f"{name} {number}: {end}"])


def main() -> None:
    """Fuzz every kind and print a table; exit code 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000, help="over all kinds of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind of file")
    parser.add_argument("--number", type=int, help="one change of it, in this process")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "names").mkdir()
        targets = make_targets(folder / "names")
        if asked.number is not None:
            chosen = next(target for target in targets if target.name == asked.only)
            sys.exit("\n".join(fuzz(chosen, range(asked.number, asked.number + 1), asked.seed).wrong) or 0)
        names = [target.name for target in targets if asked.only in (None, target.name)]
        each = -(-asked.mutations // len(names))
        tallies = []
        print(f"{'kind':<18}{'changes':>9}{'refused':>9}{'same':>9}{'unverified':>12}{'wrong':>7}"
              f"{'slowest':>11}{'peak':>9}")  # fmt: skip
        for number, name in enumerate(names):
            tally = _in_a_process(name, range(each), asked.seed, folder / str(number))
            tallies.append(tally)
            counts = [tally.counts[name] for name in ("refused", "same", "unverified", "WRONG")]
            print(f"{name:<18}{sum(counts):>9}{counts[0]:>9}{counts[1]:>9}{counts[2]:>12}{counts[3]:>7}"
                  f"{tally.slowest:>9.2f} s{tally.megabytes:>6.0f} MB", flush=True)  # fmt: skip
    for tally in tallies:
        print(*tally.wrong[:20], sep="\n")
        if tally.megabytes > MOST_MEGABYTES:
            print(f"{tally.name}: {tally.megabytes:.0f} MB; allowed: {MOST_MEGABYTES}")
    sys.exit(any(tally.wrong or tally.megabytes > MOST_MEGABYTES for tally in tallies))


if __name__ == "__main__":
    main()
