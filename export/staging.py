"""A folder appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.errors import ItuneError


@contextmanager
def staged_folder(output: Path, *, force: bool, mark: str) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends well, and vanishes otherwise.

    An existing `output` is replaced only with `force`, and only if it holds `mark`, which tells that it was
    written by the same command.

    Raises:
        ItuneError: `output` exists and must not be replaced.
    """
    output = output.absolute()
    _check_free(output, force, mark)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging, old = (output.with_name(f".{output.name}.{os.getpid()}.{suffix}") for suffix in ("new", "old"))
    staging.mkdir()
    try:
        yield staging
        _check_free(output, force, mark)
        if output.exists():
            output.rename(old)
        staging.rename(output)
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
        for folder in (staging, old):
            shutil.rmtree(folder, ignore_errors=True)


def _check_free(output: Path, force: bool, mark: str) -> None:
    if not output.exists():
        return
    if not force:
        raise ItuneError(f"{output} exists: give another --output, or --force to replace it")
    if not (output / mark).exists():
        raise ItuneError(
            f"{output} has no {mark}: --force will not replace what is something else; choose another --output"
        )
