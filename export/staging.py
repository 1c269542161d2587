"""What the exporter writes appears whole or not at all, and replaces nothing that it did not write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint import atomic_folder
from ..runtime.errors import ItuneError


@contextmanager
def staged_folder(output: Path, *, force: bool, mark: str) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block ends well, and vanishes otherwise.

    Raises:
        ItuneError: `output` exists, and there is no `force` or it does not hold `mark`, which tells that an
            earlier export wrote it.
    """
    output = output.absolute()
    if output.exists():
        if not force:
            raise ItuneError(f"{output} exists: give another --output, or --force to replace it")
        if not (output / mark).exists():
            raise ItuneError(
                f"{output} has no {mark}: --force will not replace what is something else; choose another --output"
            )
    with atomic_folder(output) as folder:
        yield folder
