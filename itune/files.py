"""Files and folders that appear whole or not at all, and replace nothing that is not ours; hashes of them."""

from __future__ import annotations

import glob
import hashlib
import json
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .runtime.errors import ItuneError

_SHOWN = 40
"""So much of a name is in that of its temporary file."""


def hash_files(paths: list[Path]) -> str:
    """SHA-256 of the files' contents, one after the other in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, or vanishes.

    Where `folder` is a symbolic link, of what it leads to. Raises ItuneError where there can be no such folder.
    """
    try:
        folder = folder.resolve()
    except RuntimeError:  # until Python 3.13
        raise ItuneError(f"{folder} is a symbolic link to itself: name another place") from None
    temporary = _temporary(folder)
    old = temporary.with_suffix(".old")
    try:
        if folder.exists() and not folder.is_dir():
            raise FileExistsError
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        reason = "a file is in its way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise ItuneError(f"{folder} cannot be written ({reason}): name another place") from None
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        if not folder.exists() and old.exists():
            old.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, or vanishes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def recover_folder(folder: Path) -> None:
    """Put back what an `atomic_folder` that was killed between its two renamings has left; else do nothing."""
    if folder.exists():
        return
    for old in sorted(folder.parent.glob(f".{glob.escape(folder.name[:_SHOWN])}.*.old")):
        new = old.with_suffix(".tmp")  # complete, or the old one were still in its place
        (new if new.exists() else old).rename(folder)
        return


def keep_foreign(folder: Path, own: Collection[str]) -> None:
    """Raise ItuneError if a folder that is to be replaced holds what is not among our `own` names."""
    if foreign := sorted(child.name for child in folder.iterdir() if child.name not in own):
        raise ItuneError(f"{folder} holds {foreign[0]}, which would be lost: move it away, or choose another folder")


def listed_files(manifest: Path) -> set[str]:
    """The names of a manifest and of the `files` that it lists; none where there is no such manifest."""
    try:
        files = json.loads(manifest.read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {manifest.name, *files} if isinstance(files, dict) else set()


def _temporary(path: Path) -> Path:
    """A name beside `path`, of which only a part is in it: names may be as long as the file system allows."""
    # Not by the process id, which is the same every time in a container, where a killed run may have left its own.
    return path.with_name(f".{path.name[:_SHOWN]}.{secrets.token_hex(4)}.tmp")
