"""Refusals: what the service does not do, with a status and a sentence."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

RETRY_AFTER = "1"
_LINGER = 1.0
"""Seconds in which the rest of a refused body is read and dropped."""


class Refusal(Exception):  # noqa: N818
    """Ends a request with this answer."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        """503 gets Retry-After."""
        super().__init__(sentence)
        self.status = status
        self.headers = (headers or {}) | ({"Retry-After": RETRY_AFTER} if status == 503 else {})


def refuse(request: Request, refusal: Refusal) -> Response:
    """The answer to a refused request. `request.state.read` is set once its body was read."""
    content, whole = {"error": str(refusal)}, getattr(request.state, "read", False)
    return (JSONResponse if whole else _EarlyResponse)(content, refusal.status, refusal.headers)


class _EarlyResponse(JSONResponse):
    """Answers a client that may still send its body, drops what arrives for a moment, and closes the connection.

    A connection that is closed with unread data is reset, and the client may lose the answer.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole answer before the rest of the body is awaited."""
        self.headers["Connection"] = "close"

        async def send_and_linger(message: Message) -> None:
            if message["type"] != "http.response.body":
                await send(message)
                return
            await send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(_LINGER):
                    while (await receive()).get("more_body"):
                        pass
            await send({"type": "http.response.body"})

        await super().__call__(scope, receive, send_and_linger)
