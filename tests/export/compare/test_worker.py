"""Objects in processes of their own, and who sees Ctrl-C."""

import os
import signal
import sys
import threading

import pytest

from itune.export.compare.worker import Worker, _ctrl_c_held_back
from itune.runtime.errors import ItuneError


class Counter:
    def __init__(self, start: int) -> None:
        if start < 0:
            raise ItuneError("start: must not be negative")
        self.value = start

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value

    def interrupt(self) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "still here"

    def end(self) -> None:
        os._exit(3)


def test_calls_keep_the_object():
    worker = Worker("counter", Counter, 40)
    assert worker.call("add", 1) == 41
    assert worker.call("add", amount=1) == 42
    assert worker.close() > 1  # MB


def test_errors_are_the_objects_own():
    with pytest.raises(ItuneError, match="start: must not be negative"):
        Worker("counter", Counter, -1)


def test_a_process_that_died_is_named():
    worker = Worker("counter", Counter, 0)
    with pytest.raises(ItuneError, match="the counter process died with status 3"):
        worker.call("end")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_is_not_the_workers():
    worker = Worker("counter", Counter, 0)
    assert worker.call("interrupt") == "still here"
    worker.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_while_a_worker_starts_is_not_lost():
    started = False
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    done = threading.Event()
    other = threading.Thread(target=done.wait)  # which may be given the signal, as it does not block it
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt), _ctrl_c_held_back():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGINT)
            started = True
    finally:
        done.set()
        signal.signal(signal.SIGINT, before)
    assert started
