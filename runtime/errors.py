"""Errors that a user can fix. The command lines print them as one sentence, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LONGEST = 1000
"""Characters of a message; the middle of a longer one is left out."""


_KEPT = "\u00a0\u202f\u3000\u200c\u200d"
"""Spaces of file names and of Japanese, and the joiners in the words of some scripts and in emoji."""


def printable(text: str) -> str:
    """Escape what would break a line or reach the terminal as a command: names and captions come from anywhere."""
    return "".join(c if c.isprintable() or c in _KEPT else c.encode("unicode_escape").decode() for c in text)


class ItuneError(Exception):
    """Base of all errors that a user can fix; the message names the file and the field, and says how to mend it.

    It is one printable line.
    """

    def __str__(self) -> str:
        """Return the message."""
        text = printable(super().__str__())
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}...{text[3 - _LONGEST // 2 :]}"


class ImageError(ItuneError):
    """An image cannot be decoded, or is refused (too large, truncated, not an image)."""


class BundleError(ItuneError):
    """A bundle is missing, incomplete, damaged, or of another schema version."""


class DatastoreError(ItuneError):
    """A datastore is missing, incomplete, damaged, or was built with another encoder."""


class SearchError(ItuneError):
    """Search options contradict each other or the model."""


class EngineError(ItuneError):
    """An engine cannot run here: no GPU, a missing library, or a plan for another machine."""


def reason(error: BaseException) -> str:
    """What a library says about bad input, in one line: pydantic's first field and message, or the first line."""
    if hasattr(error, "error_count") and hasattr(error, "errors"):  # pydantic's ValidationError, without importing it
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))
        message: str = first["msg"].removeprefix("Value error, ")
        if first["type"] not in ("value_error", "missing", "extra_forbidden", "json_invalid"):
            message += f", not {ascii(first['input'])[:60]}"
        return f"{field}: {message}" if field else message
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [""])[0][:300] or type(error).__name__


@contextmanager
def reading(path: Path | str, error: type[ItuneError] = ItuneError, mend: str = "") -> Iterator[None]:
    """Turn any exception while `path` is read into one `error` that names it; an ItuneError passes unchanged.

    `mend` says what the user can do about it.
    """
    try:
        yield
    except ItuneError:
        raise
    except Exception as cause:  # on damaged files the libraries raise nearly everything
        raise error(f"{path}: {reason(cause)}{f'; {mend}' if mend else ''}") from cause
