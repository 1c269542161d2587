"""An object in a process of its own, called over a pipe, so that what is timed has its own threads and memory.

A waiting process uses no CPU. It ends with the process that started it.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ...runtime.errors import ItuneError


class Worker:
    """The object that `make(*arguments)` returns in the new process; `name` appears in errors.

    Every method raises the object's own ItuneError, ItuneError if the process died, and RuntimeError with the traceback
    for anything else.
    """

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        context = get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the object."""
        return self._answer((method, arguments, options))

    def close(self) -> float:
        """End the process; returns its peak resident memory in MB."""
        peak: float = self._answer(None)
        self.process.join()
        return peak

    def kill(self) -> None:
        """End the process at once."""
        self.process.terminate()
        self.process.join()

    def _answer(self, *message: Any) -> Any:
        try:
            for each in message:
                self.pipe.send(each)
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            status = self.process.exitcode
            raise ItuneError(f"the {self.name} process died with status {status}, perhaps out of memory") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
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
    """The peak resident memory of this process in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage would count what the parent had when it started this process
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
