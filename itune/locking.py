"""One writer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .runtime.errors import ItuneError


@contextmanager
def only_writer(lock_file: Path, busy: str, error: type[ItuneError] = ItuneError) -> Iterator[None]:
    """Hold a lock within the block; its file is removed with it.

    Raises:
        ItuneError: somebody else holds it, which `busy` says, or there can be no such file; an `error`.
    """
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise error(busy) from None
    except OSError as reason:
        raise error(f"{lock_file.parent} cannot be written to ({reason.strerror}): name another folder") from None
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)
        lock.release()
