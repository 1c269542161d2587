"""Output folders that appear complete or not at all, and replace only what an earlier export wrote."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import atomic_folder, keep_foreign
from ..runtime.errors import ItuneError


@contextmanager
def staged_folder(output: Path, *, force: bool, own: Callable[[Path], Collection[str]]) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block ends without an error, and is deleted otherwise.

    `own` returns the names in a folder that an earlier export wrote, none if it is something else.

    Raises:
        ItuneError: `output` exists and may not be replaced, or it appears before the block ends.
    """
    output = output.absolute()
    replaces = output.exists()
    if replaces:
        names = own(output) if force and output.is_dir() else ()
        if not names:
            why = "is not an earlier output, so --force cannot replace it" if force else "exists; --force replaces it"
            raise ItuneError(f"{output} {why}: choose another --output")
        keep_foreign(output, names)
    with atomic_folder(output) as folder:
        yield folder
        if output.exists() and not replaces:
            raise ItuneError(f"{output} appeared during the export: choose another --output")
