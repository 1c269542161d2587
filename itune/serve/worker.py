"""A worker: a process with a captioner. What happens to it, a crash included, the service survives."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from ..runtime.captioner import Captioner
from ..runtime.errors import ItuneError
from ..runtime.search.options import OptionReader
from .queue import Result

_SPAWN = multiprocessing.get_context("spawn")  # a fork would copy the service's locks and connections

_LOST = "the worker ended before it had captioned this photo's batch: send it again"


class WorkerLostError(ItuneError):
    """The worker ended, or was stopped because its batch took too long."""


@dataclass(frozen=True)
class Loaded:
    """What a worker says about its captioner once it is loaded."""

    options: OptionReader
    engine: str
    kernels: str | None
    notice: str | None


class Worker:
    """The service's side. `loaded`, `caption` and `wait_for_end` block."""

    def __init__(self, load: Callable[[], Captioner]) -> None:
        """Start the process. Raises OSError if the system has no room for it."""
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_work, args=(theirs, load), name="itune-serve-worker", daemon=True)
        try:
            self._process.start()
        finally:
            theirs.close()  # else the worker's end would stay open when it dies

    def loaded(self) -> Loaded:
        """Wait until the captioner is loaded.

        Raises:
            ItuneError: what `load` raised, or WorkerLostError.
        """
        answer = self._receive()
        if isinstance(answer, ItuneError):
            raise answer
        return answer  # type: ignore[no-any-return]

    def caption(self, photos: Sequence[bytes], options: dict[str, Any]) -> list[Result]:
        """Caption a batch.

        Raises:
            WorkerLostError: the process ended first.
        """
        try:
            self._pipe.send((photos, options))
        except OSError as error:
            raise WorkerLostError(_LOST) from error
        return self._receive()  # type: ignore[no-any-return]

    def wait_for_end(self) -> None:
        """Wait until the process ends."""
        wait([self._process.sentinel])

    def close(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except Exception as error:  # what a dying process leaves may be damaged
            raise WorkerLostError(_LOST) from error


def _work(pipe: Connection, load: Callable[[], Captioner]) -> None:
    """The worker's side: load, then answer until the service closes the pipe."""
    for each in (signal.SIGINT, signal.SIGTERM):  # which reach the whole group: the service decides when to end
        signal.signal(each, signal.SIG_IGN)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # ImageErrors carry what matters of its complaints
    with suppress(EOFError, BrokenPipeError):  # the service is gone
        try:
            captioner = load()
        except ItuneError as error:
            pipe.send(error)
            return
        pipe.send(Loaded(captioner.option_reader, captioner.engine_name, captioner.kernels, captioner.engine_notice))
        while True:
            photos, options = pipe.recv()
            pipe.send(_caption(captioner, photos, options))


def _caption(captioner: Captioner, photos: list[bytes], options: dict[str, Any]) -> list[Result]:
    try:
        return [result for _, result in captioner.stream(photos, batch_size=len(photos), **options)]
    except ItuneError as error:  # options that only the engine can refuse
        return [error] * len(photos)
