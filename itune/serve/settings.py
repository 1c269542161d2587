"""The options of the service."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from ..runtime.settings import Settings

_Count = Annotated[int, Field(ge=1, le=4096)]
_Seconds = Annotated[float, Field(gt=0, le=86400)]
_Megabytes = Annotated[float, Field(gt=0, le=65536)]


class Batching(Settings, title="Batching"):
    """How requests become batches."""

    workers: _Count = 1
    """Processes, each with the model and --threads threads of its own."""
    max_batch: _Count = 8
    """Most photos at once through a model. Only requests with equal options share a batch."""
    max_wait_ms: Annotated[float, Field(ge=0, le=10_000)] = 5
    """How long a photo waits for others to share a batch with, while a worker is free."""


class Limits(Settings, title="Limits"):
    """What a request may ask for, and what the service holds at once."""

    max_images: _Count = 16
    """Photos in a request."""
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Photos that wait for a worker; more are refused with 503."""
    max_body_mb: _Megabytes = 20
    """Megabytes of a request's body."""
    max_held_mb: _Megabytes = 256
    """Megabytes of all requests that are being read, wait or are captioned; more are refused with 503."""
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Open connections; requests on more are refused with 503."""
    max_beams: _Count = 16
    """Beams or samples that a request may ask for."""
    max_tokens: _Count = 64
    """max_new_tokens that a request may ask for."""
    header_timeout: _Seconds = 10
    """Seconds in which a client must send its headers."""
    body_timeout: _Seconds = 30
    """Seconds in which a client must send its body."""
    batch_timeout: _Seconds = 120
    """Seconds after which a batch has failed and its worker is replaced."""

    @model_validator(mode="after")
    def _largest_request_fits(self) -> Self:
        if self.max_images > self.max_queue:
            raise ValueError(f"max_images {self.max_images} exceeds max_queue {self.max_queue}: raise --max-queue")
        if self.max_body_mb > self.max_held_mb:
            raise ValueError(f"max_body_mb {self.max_body_mb} exceeds max_held_mb {self.max_held_mb}")
        return self
