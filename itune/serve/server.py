"""Runs the service on uvicorn."""

from __future__ import annotations

import asyncio
import functools
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from ..runtime.captioner import Captioner
from .app import Service
from .metrics import Metrics
from .pool import WorkerPool
from .settings import Batching, Limits

_MOST_HEADER_BYTES = 16_384


class _Protocol(H11Protocol):
    """HTTP/1.1 that closes a connection whose headers do not arrive; uvicorn would wait forever."""

    def __init__(self, *arguments: Any, header_timeout: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._header_timeout = header_timeout

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_request()

    def _expect_request(self) -> None:
        self.loop.call_later(self._header_timeout, self._close_unless_after, self.cycle)

    def _close_unless_after(self, cycle: RequestResponseCycle | None) -> None:
        if self.cycle is cycle and (cycle is None or cycle.response_complete):
            self.timeout_keep_alive_handler()


def serve(
    load: Callable[[], Captioner],
    listener: socket.socket,
    batching: Batching,
    limits: Limits,
    *,
    token: str | None,
    cors_origins: Sequence[str],
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; what was accepted is answered first.

    Raises:
        ItuneError: no worker can load the model.
    """
    failures: list[Exception] = []

    def stop(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    metrics = Metrics()
    pool = WorkerPool(load, batching, limits, metrics)
    app = Service(pool, limits, metrics, token).app(cors_origins, stop)
    config = uvicorn.Config(
        app,
        http=functools.partial(_Protocol, header_timeout=limits.header_timeout),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        loop="asyncio",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=limits.max_connections,
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
    )
    server = uvicorn.Server(config)
    # uvicorn raises the signal that ended it again, once it has finished: a stop as asked for is a success.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
