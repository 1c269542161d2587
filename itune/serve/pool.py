"""Keeps the workers running and hands them the batches of the queue."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from ..runtime.captioner import Captioner
from ..runtime.errors import ItuneError
from .metrics import Metrics
from .queue import Job, JobQueue, Result
from .settings import Batching, Limits
from .worker import Loaded, Worker, WorkerLostError

_PAUSE = 2.0
"""Seconds before the next attempt to replace a worker that could not be loaded."""
T = TypeVar("T")


class WorkerPool:
    """Workers that are replaced when they end. A worker that ends takes its batch with it, and nothing else."""

    def __init__(self, load: Callable[[], Captioner], batching: Batching, limits: Limits, metrics: Metrics) -> None:
        """`load` is called in every worker."""
        self._load, self._batching, self._limits, self._metrics = load, batching, limits, metrics
        self.queue = JobQueue(limits.max_queue, batching.max_batch, batching.max_wait_ms / 1000)
        self.loaded: Loaded | None = None
        """What the latest worker said; None until the first is loaded."""
        self.ready = 0
        """Workers that are loaded."""
        # One thread waits for a worker's answers, another for its end.
        self._threads = ThreadPoolExecutor(2 * batching.workers, thread_name_prefix="itune-serve")

    @asynccontextmanager
    async def running(self, on_failure: Callable[[Exception], object]) -> AsyncIterator[None]:
        """Run the workers during the block; `on_failure` hears why none can be loaded at the start."""
        tasks = [asyncio.create_task(self._keep_working(on_failure)) for _ in range(self._batching.workers)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._threads.shutdown()

    async def _keep_working(self, on_failure: Callable[[Exception], object]) -> None:
        while True:
            worker = loaded = None
            try:
                worker = Worker(self._load)
                loaded = await self._in_thread(worker.loaded)
                await self._use(worker, loaded)
            except (ItuneError, OSError) as error:
                if self.loaded is None:
                    on_failure(error)
                    return
                print(f"itune-serve: {error}; starting another worker", file=sys.stderr, flush=True)
                self._metrics.worker_restarts.inc()
            finally:
                if worker:
                    worker.close()
            if loaded is None:  # such as a bundle that was moved
                if not self.ready:
                    waiting = self.queue.take_all()
                    self._answer(waiting, [WorkerLostError("no worker can be loaded now")] * len(waiting))
                await asyncio.sleep(_PAUSE)

    async def _use(self, worker: Worker, loaded: Loaded) -> None:
        """Give batches to a worker until it ends, which raises WorkerLostError."""
        if self.loaded is None and loaded.notice:
            print(f"itune-serve: {loaded.notice}", file=sys.stderr, flush=True)
        self.loaded = loaded
        self.ready += 1
        ended = asyncio.ensure_future(self._in_thread(worker.wait_for_end))
        taking = None
        try:
            while True:
                taking = asyncio.create_task(self.queue.take())
                await asyncio.wait({taking, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not taking.done():
                    raise WorkerLostError("a worker ended while it had nothing to do")
                await self._caption(worker, taking.result())
        finally:
            self.ready -= 1
            if taking:
                taking.cancel()

    async def _caption(self, worker: Worker, batch: list[Job]) -> None:
        photos = [job.photo for job in batch]
        self._metrics.batch_photos.observe(len(photos))
        seconds = self._limits.batch_timeout
        try:
            async with asyncio.timeout(seconds):
                with self._metrics.batch_seconds.time():
                    results = await self._in_thread(worker.caption, photos, batch[0].options)
        except (WorkerLostError, TimeoutError) as error:
            late = isinstance(error, TimeoutError)
            lost = WorkerLostError(f"the photo's batch took longer than {seconds:g} seconds" if late else str(error))
            self._answer(batch, [lost] * len(batch))
            raise lost from error
        self._answer(batch, results)

    def _answer(self, batch: list[Job], results: list[Result]) -> None:
        for job, result in zip(batch, results, strict=True):
            self._metrics.count_photo(result)
            if not job.result.done():  # the client may have gone
                job.result.set_result(result)

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)
