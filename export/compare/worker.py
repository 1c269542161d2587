"""An object in a process of its own, called over a pipe: it has its own threads and memory, and waits without CPU.

A `ProcessPoolExecutor` would not end with a parent that was killed, nor say with which status its process died.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from ...runtime.errors import ItuneError


class Worker:
    """The object that `make(*arguments)` returns in the new process; errors name it `name`.

    Every method raises the object's own ItuneError, an ItuneError if the process died, and otherwise a RuntimeError
    with the traceback.
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

    def kill(self) -> None:
        """End the process."""
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
        while True:
            method, positional, options = pipe.recv()
            pipe.send(getattr(served, method)(*positional, **options))
    except (EOFError, ConnectionError):
        pass  # the parent is gone
    except ItuneError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))
