"""The HTTP interface."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..caption_json import caption_json
from ..runtime.errors import ImageError, ItuneError
from . import search_options
from .body import Intake, read_body
from .metrics import Metrics, RequestMetrics
from .openapi import describe_service
from .pool import WorkerPool
from .queue import QueueFull, Result
from .refusal import RETRY_AFTER, Refusal, refuse
from .settings import Limits
from .worker import Loaded, WorkerLostError

_PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_NDJSON = "application/x-ndjson"


class Service:
    """The endpoints."""

    def __init__(self, pool: WorkerPool, limits: Limits, metrics: Metrics, token: str | None) -> None:
        """With a `token`, captions and metrics need it as a bearer token."""
        self._pool, self._limits, self._metrics, self._token = pool, limits, metrics, token
        self._intake = Intake(limits)
        metrics.watch("itune_queue_photos", "Photos that wait.", lambda: len(pool.queue))
        metrics.watch("itune_held_bytes", "Bytes of the requests that are held.", lambda: self._intake.held)
        metrics.watch("itune_workers_ready", "Workers that are loaded.", lambda: pool.ready)

    def app(self, cors_origins: Sequence[str], on_failure: Callable[[Exception], object]) -> Starlette:
        """The ASGI application; `on_failure` hears why no worker can be loaded at the start."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            async with self._pool.running(on_failure):
                yield

        routes = [
            Route("/v1/caption", self.caption, methods=["POST"]),
            Route("/healthz", self.health),
            Route("/readyz", self.ready),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
            Route("/", partial(_page_file, "index.html", "text/html")),
            Route("/page.js", partial(_page_file, "page.js", "text/javascript")),
            Route("/page.css", partial(_page_file, "page.css", "text/css")),
        ]
        middleware = [Middleware(RequestMetrics, self._metrics, frozenset(route.path for route in routes))]
        if cors_origins:
            headers = ["Authorization", "Content-Type"]
            middleware.append(
                Middleware(
                    CORSMiddleware, allow_origins=cors_origins, allow_methods=["GET", "POST"], allow_headers=headers
                )
            )
        handlers: dict[Any, Any] = {
            QueueFull: lambda request, _: refuse(request, Refusal(503, "the queue is full: try again soon")),
            Refusal: refuse,
            HTTPException: lambda request, error: refuse(
                request, Refusal(error.status_code, error.detail, error.headers)
            ),
            ClientDisconnect: lambda _, __: Response(status_code=499),
        }
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)

    async def health(self, _: Request) -> Response:
        """Whether the service runs."""
        return PlainTextResponse("ok\n")

    async def ready(self, _: Request) -> Response:
        """Whether a worker can caption."""
        if not self._pool.ready:
            raise Refusal(503, "no worker is loaded yet")
        return PlainTextResponse("ready\n")

    async def metrics(self, request: Request) -> Response:
        """The metrics for Prometheus."""
        self._authorise(request)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, _: Request) -> Response:
        """The OpenAPI description."""
        return JSONResponse(describe_service(self._limits, authorised=self._token is not None))

    async def caption(self, request: Request) -> Response:
        """Caption the photos of a request."""
        self._authorise(request)
        loaded = self._pool.loaded
        if loaded is None:
            raise Refusal(503, "the model is not loaded yet")
        self._pool.queue.check_room(1)  # before the client sends its photos
        with ExitStack() as stack:  # when it closes, photos are released and leave the queue
            hold = stack.enter_context(self._intake.holding())
            photos, options = await read_body(request, self._limits, hold)
            config = search_options.check(options, loaded.options, self._limits)
            results = self._pool.queue.put([photo.content for photo in photos], options, config)
            for each in results:
                stack.callback(each.cancel)
            answers = [_Answer(photo.name, each, loaded) for photo, each in zip(photos, results, strict=True)]
            if _NDJSON in request.headers.get("accept", ""):
                return _Lines(answers, stack.pop_all())
            await _unless_client_leaves(request, results)
            records = [await answer.record() for answer in answers]
            if len(records) > 1:
                return JSONResponse({"results": records})
            status = records[0].get("status", 200)
            return JSONResponse(records[0], status, {"Retry-After": RETRY_AFTER} if status == 503 else None)

    def _authorise(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = self._token is None or hmac.compare_digest(given.strip().encode(), self._token.encode())
        if not right or (self._token and scheme.lower() != "bearer"):
            raise Refusal(401, "send the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})


@dataclass(frozen=True)
class _Answer:
    name: str
    result: asyncio.Future[Result]
    loaded: Loaded

    async def record(self) -> dict[str, Any]:
        """The photo's JSON object; an error has the status that it would have alone."""
        result = await self.result
        if isinstance(result, ImageError):
            result = ImageError(f"{self.name}: {str(result).removeprefix('the image: ')}")
        record = caption_json(self.name, result, self.loaded.engine, self.loaded.kernels)
        if isinstance(result, ItuneError):
            record["status"] = 503 if isinstance(result, WorkerLostError) else 422
        return record


class _Lines(StreamingResponse):
    """JSON Lines, each as soon as it and those before it are there."""

    def __init__(self, answers: Sequence[_Answer], stack: ExitStack) -> None:
        """`stack` closes at the end, also if the client leaves."""
        super().__init__(_lines(answers), media_type=_NDJSON)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stack:
            await super().__call__(scope, receive, send)


async def _lines(answers: Sequence[_Answer]) -> AsyncIterator[str]:
    for answer in answers:
        yield f"{json.dumps(await answer.record())}\n"


async def _unless_client_leaves(request: Request, results: Sequence[asyncio.Future[Result]]) -> None:
    """Wait for all results. Raises ClientDisconnect."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    left = asyncio.create_task(leaving())
    waiting: set[asyncio.Future[Any]] = set(results)
    try:
        while waiting:
            finished, _ = await asyncio.wait({left, *waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting -= finished
            if waiting and left in finished:
                raise ClientDisconnect
    finally:
        left.cancel()


async def _page_file(name: str, kind: str, _: Request) -> Response:
    return Response(_read_page(name), media_type=kind, headers=_PAGE_HEADERS)


@cache
def _read_page(name: str) -> bytes:
    return (_PAGE / name).read_bytes()
