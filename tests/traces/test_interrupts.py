import os
import signal
import threading

import pytest

from traces.interrupts import Deferral


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_comes_at_the_end_and_the_handler_is_back():
    before, deferral, passed = signal.getsignal(signal.SIGINT), Deferral(), []
    deferral.begin()
    deferral.begin()
    press()
    passed.append("first")
    deferral.end()
    passed.append("second")
    with pytest.raises(KeyboardInterrupt):
        deferral.end()
    assert passed == ["first", "second"]
    assert signal.getsignal(signal.SIGINT) is before
    deferral.begin()
    deferral.end()


def test_of_two_the_outer_one_hands_it_on():
    outer, inner = Deferral(), Deferral()
    outer.begin()
    inner.begin()
    press()
    inner.end()
    with pytest.raises(KeyboardInterrupt):
        outer.end()


def test_another_thread_changes_nothing():
    before, deferral = signal.getsignal(signal.SIGINT), Deferral()

    def both():
        deferral.begin()
        deferral.end()

    thread = threading.Thread(target=both)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
