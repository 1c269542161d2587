"""Reads the photos and options of a request, within the limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from . import search_options
from .refusal import Refusal
from .settings import Limits

_OPTIONS = "options"
"""The multipart part with the options."""


@dataclass(frozen=True)
class Photo:
    """An encoded photo; its name is a label and never opened."""

    name: str
    content: bytes


class Intake:
    """Counts the bytes of all requests that the service holds."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self.held = limits, 0

    @contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that a request calls for all bytes that it reads; they are released after the block.

        It raises Refusal where the request, or all of them together, are too large.
        """
        own = 0

        def hold(size: int) -> None:
            nonlocal own
            own += size
            self.held += size
            if own > self._limits.max_body_mb * 1e6:
                raise Refusal(
                    413, f"the body is larger than {self._limits.max_body_mb:g} MB: send fewer or smaller photos"
                )
            if self.held > self._limits.max_held_mb * 1e6:
                raise Refusal(503, "the service holds as many photos as it may: try again soon")

        try:
            yield hold
        finally:
            self.held -= own


async def read_body(
    request: Request, limits: Limits, hold: Callable[[int], None]
) -> tuple[list[Photo], dict[str, Any]]:
    """The photos of a request, and the options in its query and, for multipart, in its JSON part.

    Raises:
        Refusal: a limit is exceeded, or the request is none.
        ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data" and kind != "application/octet-stream" and not kind.startswith("image/"):
        raise Refusal(
            415, f"Content-Type {kind!r}: send multipart/form-data, an image/ type or application/octet-stream"
        )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limits.max_body_mb * 1e6:  # before the client sends it
        hold(int(declared))

    async def chunks() -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            hold(len(chunk))
            yield chunk
        request.state.read = True

    options = search_options.from_query(request.query_params.multi_items())
    try:
        async with asyncio.timeout(limits.body_timeout):
            if kind != "multipart/form-data":
                return [Photo("image", b"".join([chunk async for chunk in chunks()]))], options
            photos, part = await _read_parts(request.headers, chunks(), limits.max_images)
    except TimeoutError as error:
        raise Refusal(408, f"the body did not arrive within {limits.body_timeout:g} seconds") from error
    return photos, options | part


class _Parser(MultiPartParser):
    spool_max_size = 0  # in memory however large: the body has a limit, and the disk may be read-only
    ended = False

    def on_end(self) -> None:
        self.ended = True
        super().on_end()

    def on_part_begin(self) -> None:
        if len(self.items) == self.max_files:
            raise Refusal(413, "too many parts: send several requests")
        super().on_part_begin()


async def _read_parts(
    headers: Headers, chunks: AsyncGenerator[bytes, None], max_images: int
) -> tuple[list[Photo], dict[str, Any]]:
    parser = _Parser(headers, chunks, max_files=max_images + 1)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(400, f"multipart/form-data: {error.message}") from error
    except UnicodeError as error:  # of a charset that the client names
        raise Refusal(400, f"multipart/form-data: {error}") from error
    if not parser.ended:
        raise Refusal(400, "multipart/form-data: the body ends before its last boundary")
    photos: list[Photo] = []
    options: dict[str, Any] = {}
    for name, part in form.multi_items():
        content = await part.read() if isinstance(part, UploadFile) else part.encode(errors="replace")
        if name == _OPTIONS:
            options |= search_options.from_json(content)
        elif isinstance(part, UploadFile):
            photos.append(Photo(part.filename or name, content))
        else:
            raise Refusal(
                422, f"the part {name} has no file name: photos have one, and options are a JSON part {_OPTIONS}"
            )
    if len(photos) > max_images:
        raise Refusal(413, f"more than {max_images} photos: send several requests")
    if not photos:
        raise Refusal(422, "there is no photo: send parts with a file name")
    return photos, options
