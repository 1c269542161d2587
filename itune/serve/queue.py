"""The queue of photos: what arrives together and has equal options leaves as one batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeAlias

from ..runtime.caption import Caption
from ..runtime.errors import ItuneError
from ..runtime.search.config import SearchConfig

Result: TypeAlias = Caption | ItuneError


@dataclass(eq=False)
class Job:
    """A photo that waits for its caption."""

    photo: bytes
    options: dict[str, Any]
    """As the client gave them."""
    config: SearchConfig
    """What they mean."""
    result: asyncio.Future[Result]
    """Cancelled, it leaves the queue."""
    arrived: float = field(default_factory=monotonic)


class QueueFull(Exception):  # noqa: N818
    """The queue has no room for a request."""


class JobQueue:
    """Photos in the order of their arrival."""

    def __init__(self, size: int, max_batch: int, max_wait: float) -> None:
        """`size` photos wait at most; a batch of fewer than `max_batch` waits `max_wait` seconds for more."""
        self._size, self._max_batch, self._max_wait = size, max_batch, max_wait
        self._waiting: dict[Job, None] = {}
        self._arrival = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def check_room(self, photos: int) -> None:
        """Raise QueueFull unless this many photos more can wait."""
        if len(self) + photos > self._size:
            raise QueueFull

    def put(
        self, photos: Sequence[bytes], options: dict[str, Any], config: SearchConfig
    ) -> list[asyncio.Future[Result]]:
        """Add the photos of a request, all or none; the futures get the results.

        Raises:
            QueueFull: they do not fit.
        """
        self.check_room(len(photos))
        loop = asyncio.get_running_loop()
        jobs = [Job(photo, options, config, loop.create_future()) for photo in photos]
        for job in jobs:
            self._waiting[job] = None
            job.result.add_done_callback(self._remover(job))
        self._arrival.set()
        return [job.result for job in jobs]

    def _remover(self, job: Job) -> Callable[[object], None]:
        return lambda _: self._waiting.pop(job, None)

    def take_all(self) -> list[Job]:
        """Empty the queue."""
        jobs, self._waiting = list(self._waiting), {}
        return jobs

    async def take(self) -> list[Job]:
        """Wait for the next batch: the oldest photo, and the oldest of those with the same options."""
        while True:
            wait = None
            if self._waiting:
                first = next(iter(self._waiting))
                batch = [job for job in self._waiting if job.config == first.config][: self._max_batch]
                wait = first.arrived + self._max_wait - monotonic()
                if len(batch) == self._max_batch or wait <= 0:
                    for job in batch:
                        del self._waiting[job]
                    return batch
            self._arrival.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._arrival.wait()
            except TimeoutError:
                pass
