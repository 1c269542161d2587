"""Objects in processes of their own, which ignore Ctrl-C."""

import os
import signal
import sys

import pytest

from itune.export.compare.worker import Worker
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
    worker.kill()


def test_errors_are_the_objects_own():
    with pytest.raises(ItuneError) as error:
        Worker("counter", Counter, -1)
    assert "start" in str(error.value)


def test_a_process_that_died_is_named():
    worker = Worker("counter", Counter, 0)
    with pytest.raises(ItuneError) as error:
        worker.call("end")
    assert "counter" in str(error.value)
    assert "status 3" in str(error.value)


def test_other_errors_come_with_their_traceback():
    worker = Worker("counter", Counter, 0)
    with pytest.raises(RuntimeError) as error:
        worker.call("add", "one")
    assert "TypeError" in str(error.value)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_is_not_the_workers():
    worker = Worker("counter", Counter, 0)
    assert worker.call("interrupt") == "still here"
    worker.kill()
