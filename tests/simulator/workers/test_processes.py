"""Processes do what they are given, in any order, and are gone when their caller is done or fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest

from simulator.workers.engines import Engine, connected
from simulator.workers.processes import processes


def square(number):
    return number * number


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def told(name):
    return os.environ.get(name)


def tell(name, value):
    os.environ[name] = value


def fail(_):
    raise ValueError("as asked")


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_content_comes_back_once(jobs):
    with connected(Engine(), jobs) as workers:
        assert sorted(workers.run(square, range(20))) == [number * number for number in range(20)]


@pytest.mark.parametrize(("jobs", "most"), [(1, 1), (2, 4)])
def test_contents_are_made_when_they_are_needed(jobs, most):
    made = []

    def contents():
        for number in range(9):
            made.append(number)
            yield number

    with connected(Engine(), jobs) as workers:
        for n_come, _ in enumerate(workers.run(square, contents()), 1):
            assert len(made) <= n_come + most


def test_processes_begin_as_they_are_told():
    with processes(1, tell, ("KVBUDGET_TEST", "said")) as workers:
        assert workers.submit(told, "KVBUDGET_TEST").result() == "said"
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_content_raises_reaches_the_caller(jobs):
    with pytest.raises(ValueError, match="as asked"), connected(Engine(), jobs) as workers:
        list(workers.run(fail, range(3)))
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_breaks_them_all():
    with pytest.raises(BrokenProcessPool), processes(2) as workers:
        list(workers.run(die, range(3)))
    assert not multiprocessing.active_children()


def test_an_interrupt_leaves_no_process_and_nothing_waiting():
    def interrupt(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), processes(1) as workers:
        interrupt(next(workers.run(square, range(50))))
    assert not multiprocessing.active_children()
