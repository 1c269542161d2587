"""What every output of itune-run has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from ...runtime.errors import ImageError, ItuneError

if TYPE_CHECKING:
    from ...runtime.caption import Caption


class SidecarError(ItuneError):
    """The sidecar of one photo cannot be written; those of the next ones may."""


@dataclass(frozen=True)
class Captioned:
    """What became of one image."""

    image: str
    """As the user named it."""
    result: Caption | ImageError
    engine: str
    kernels: str | None
    """Of the native engine."""


class Writer(AbstractContextManager["Writer"], ABC):
    """Writes results, one by one, within a `with`."""

    def has(self, image: str) -> bool:  # noqa: ARG002
        """Whether an earlier run, which this one resumes, wrote the image's result."""
        return False

    @abstractmethod
    def write(self, captioned: Captioned) -> None:
        """Write a result.

        Raises:
            NoSpaceError: the disk is full.
            ItuneError: the result cannot be written.
        """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close what is open."""
