"""An object in a process of its own, called over a pipe: so that what is timed has its own threads and memory.

A process that waits for a call uses no CPU, and it ends with the one that started it.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from ...runtime.errors import ItuneError


class Worker:
    """The object that `make(*arguments)` returns in the new process; all of them must be picklable.

    `name` is what errors call it. Every method raises the ItuneError that the object raised, ItuneError if the process
    died, and RuntimeError with the traceback for anything else.
    """

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        context = get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        with _ctrl_c_held_back():
            self.process.start()
        theirs.close()
        self._receive()  # made

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the object."""
        self._send((method, arguments, options))
        return self._receive()

    def close(self) -> float:
        """End the process; returns its peak resident memory in MB."""
        self._send(None)
        peak: float = self._receive()
        self.process.join()
        return peak

    def kill(self) -> None:
        """End the process whatever it is doing."""
        self.process.terminate()
        self.process.join()

    def _send(self, message: Any) -> None:
        try:
            self.pipe.send(message)
        except ConnectionError:
            self._died()

    def _receive(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._died()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _died(self) -> NoReturn:
        self.process.join()
        status = self.process.exitcode
        raise ItuneError(f"the {self.name} process died with status {status}, perhaps for want of memory") from None


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Processes that are started meanwhile never see Ctrl-C: it is for this one, which then ends the others.

    This one sees it afterwards. (Ignoring it in the meantime would lose it.)
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where such a process would print a traceback
        yield
        return
    caught: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    # Blocked here, it may still come to another thread of this process, and Python would raise it in this one.
    hold = callable(handler) and threading.current_thread() is threading.main_thread()
    if hold:
        signal.signal(signal.SIGINT, lambda number, _frame: caught.append(number))
    resource_tracker.ensure_running()  # if it were started meanwhile, it would let the signal through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if hold:
            signal.signal(signal.SIGINT, handler)
        if caught:
            signal.raise_signal(signal.SIGINT)


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        served = make(*arguments)
        pipe.send(None)
        while (message := pipe.recv()) is not None:
            method, positional, options = message
            pipe.send(getattr(served, method)(*positional, **options))
        pipe.send(peak_memory())
    except (EOFError, ConnectionError):
        pass  # the parent is gone
    except ItuneError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))


def peak_memory() -> float:
    """The largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage would count what the parent had when it started this process
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
