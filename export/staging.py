"""What the exporter writes appears whole or not at all, and replaces nothing that it did not write."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import atomic_folder, keep_foreign
from ..runtime.errors import ItuneError


@contextmanager
def staged_folder(output: Path, *, force: bool, own: Callable[[Path], Collection[str]]) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block ends well, and vanishes otherwise.

    `own`: the names in a folder that an earlier export wrote; none where it is something else.

    Raises:
        ItuneError: `output` exists, and there is no `force` or something in it that no export wrote; or it appears
            before the block ends.
    """
    output = output.absolute()
    replaces = output.exists()
    if replaces:
        if not force:
            raise ItuneError(f"{output} exists: give another --output, or --force to replace it")
        names = own(output) if output.is_dir() else ()
        if not names:
            raise ItuneError(f"{output} is nothing that --force may replace: choose another --output")
        keep_foreign(output, names)
    with atomic_folder(output) as folder:
        yield folder
        if output.exists() and not replaces:
            raise ItuneError(f"{output} has appeared in the meantime: give another --output")
