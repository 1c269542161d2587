"""Counters and histograms for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..runtime.caption import Caption
from ..runtime.errors import ImageError, ItuneError

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """What `/metrics` shows; a registry of its own, so that several services fit in a process."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "itune_requests", "Requests, by path and status.", ["path", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "itune_request_seconds",
            "From a caption request's headers to its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.photos = Counter(
            "itune_photos", "Photos, by outcome: caption, error or lost.", ["outcome"], registry=registry
        )
        self.batch_photos = Histogram(
            "itune_batch_photos", "Photos in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.batch_seconds = Histogram(
            "itune_batch_seconds",
            "From sending a batch to a worker to its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.worker_restarts = Counter("itune_worker_restarts", "Workers that ended.", registry=registry)

    def watch(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        """Add a gauge that calls `value` when it is read."""
        Gauge(name, documentation, registry=self._registry).set_function(value)

    def count_photo(self, result: Caption | ItuneError) -> None:
        """Count a photo's result."""
        outcome = "caption" if isinstance(result, Caption) else "error" if isinstance(result, ImageError) else "lost"
        self.photos.labels(outcome).inc()

    def text(self) -> bytes:
        """All of them, in the Prometheus text format 0.0.4."""
        return generate_latest(self._registry)


class RequestMetrics:
    """ASGI middleware that counts answers, by the paths in `known`."""

    def __init__(self, app: ASGIApp, metrics: Metrics, known: frozenset[str]) -> None:
        self._app, self._metrics, self._known = app, metrics, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, path = perf_counter(), 499, scope["path"]  # 499: the client left first

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._metrics.requests.labels(path if path in self._known else "other", status).inc()
            if path == "/v1/caption":
                self._metrics.request_seconds.observe(perf_counter() - start)
