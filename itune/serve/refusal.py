"""Refusals: what the service does not do, with a status and a sentence."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.responses import JSONResponse
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


class RefusalResponse(JSONResponse):
    """Answers at once and closes the connection, after a moment in which a client that still sends can read the answer.

    A connection that is closed with unread data is reset, and the answer may be lost.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__({"error": str(refusal)}, refusal.status, {"Connection": "close", **refusal.headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, then drop what else arrives."""

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
