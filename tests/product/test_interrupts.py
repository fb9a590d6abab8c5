"""Ctrl-C reaches the main process only, from the first moment of the others on."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tiers import sampled

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups")

# In a process of its own, where nothing has started a tracker of shared resources yet.
FIRST_PROCESSES = """
import multiprocessing, signal
from simulator.workers.interrupts import held_back

def is_held(connection):
    connection.send(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    for _ in range(2):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=is_held, args=(theirs,))
        with held_back():
            process.start()
        print(ours.recv(), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        process.join()
"""
WORKERS = """
import signal
from simulator.workers.engines import Engine, connected

def is_held(content):
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())

if __name__ == "__main__":
    with connected(Engine(), 2) as workers:
        print(*workers.run(is_held, [b""] * 4))
"""
FINALIZER = """
import os, signal, sys, threading, time
from simulator.workers.interrupts import raise_again

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)

sys.unraisablehook = raise_again
try:
    del_it = Finalized()
    del del_it
    WAIT
except KeyboardInterrupt:
    print("interrupted")
"""
SIM = "from validate.cli.entry import main\nif __name__ == '__main__': main()\n"


def script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(text)
    return path


def test_no_process_sees_an_interrupt_and_the_parent_does_again(tmp_path):
    ran = subprocess.run(
        [sys.executable, script(tmp_path, FIRST_PROCESSES)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == ["True False", "True False"]


@pytest.mark.slow
def test_no_worker_of_a_sweep_sees_an_interrupt(tmp_path):
    ran = subprocess.run(
        [sys.executable, script(tmp_path, WORKERS)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["True"] * 4


@pytest.mark.parametrize(
    "wait", ["time.sleep(60)", "threading.Lock().acquire() and threading.Event().wait(60)"]
)
def test_an_interrupt_that_falls_into_a_finalizer_is_not_lost(wait, tmp_path):
    ran = subprocess.run(
        [sys.executable, script(tmp_path, FINALIZER.replace("WAIT", wait))],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert (ran.stdout, ran.stderr) == ("interrupted\n", "")


def interrupted(tmp_path, arguments, seconds):
    """Press Ctrl-C after some time, as a terminal does: all processes are told. Give exit code and words."""
    running = subprocess.Popen(
        [sys.executable, script(tmp_path, SIM), *map(str, arguments)],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(seconds)
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=30)
    return running.returncode, said


# Seconds after which a verb has nothing left to be interrupted in.
DONE_AFTER = {"help": 0.3, "sweep": 3.0, "search": 6.0}


def moments(verb):
    """Give eight moments of a run; three of them are tried on every run."""
    rng = random.Random(1)
    cases = [(verb, round(rng.uniform(0.1, DONE_AFTER[verb]), 3)) for _ in range(8)]
    return sampled(cases, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "seconds"), [case for verb in DONE_AFTER for case in moments(verb)])
def test_an_interrupt_at_any_moment_is_one_line(verb, seconds, tmp_path, make_trace):
    one, other = make_trace(n_tokens=200).path, make_trace(n_tokens=240).path
    (tmp_path / "s.toml").write_text(
        f'traces = ["{one}"]\npolicies = ["rkv", "h2o", "tova"]\nbudgets = [20, 24, 28, 32]\n'
    )
    search = f"search --trace {one} --held-out {other} --budget 20 --against rkv --also snapkv --jobs 2"
    commands = {
        "help": ["policies", "list"],
        "sweep": ["sweep", "s.toml", "--jobs", "2", "--out", "out"],
        "search": [*search.split(), "--out", "out"],
    }
    # Python itself answers, in its own words, what comes before it runs anything.
    code, said = interrupted(tmp_path, commands[verb], seconds)
    assert code in (0, 130), said
    assert "Traceback" not in said
    assert [line for line in said.splitlines() if not line.startswith("sim: ")] == []
