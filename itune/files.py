"""Write files and folders atomically, without replacing files of others; hash and lock them."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .runtime.errors import ItuneError, reading

_NAME_LENGTH = 40
"""Characters of a file's name that its temporary file's name keeps: names may be as long as the file system allows."""


def hash_files(paths: list[Path]) -> str:
    """SHA-256 of the files' contents, concatenated in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` if the block succeeds and is deleted otherwise.

    A symbolic link stays; the folder that it points to is replaced. Raises ItuneError if `folder` cannot be written.
    """
    with reading(folder, ItuneError, mend="choose another folder to write to"):
        folder = folder.resolve()
        temporary = _temporary(folder)
        old = temporary.with_suffix(".old")
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is a file")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
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
def staged_folder(output: Path, *, force: bool, own: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder that becomes the new folder `output`; with `force` it replaces an earlier output.

    `own` has the names that an earlier run wrote to `output`; it is empty if something else is there. Raises ItuneError
    if `output` may not be replaced, or appears before the block ends.
    """
    output = output.absolute()
    replaces = output.exists()
    if replaces and not (force and own):
        why = "is not an earlier output, so --force cannot replace it" if force else "exists; --force replaces it"
        raise ItuneError(f"{output} {why}: choose another --output")
    if replaces:
        refuse_foreign(output, own)
    with atomic_folder(output) as folder:
        yield folder
        if output.exists() and not replaces:
            raise ItuneError(f"{output} appeared during the export: choose another --output")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block succeeds and is deleted otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write `content` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def recover_folder(folder: Path) -> None:
    """Restore `folder` if an `atomic_folder` was killed between its two renames; otherwise do nothing."""
    if folder.exists():
        return
    for old in sorted(folder.parent.glob(f".{glob.escape(folder.name[:_NAME_LENGTH])}.*.old")):
        new = old.with_suffix(".tmp")  # complete, because the old folder was moved away after it was written
        (new if new.exists() else old).rename(folder)
        return


def refuse_foreign(folder: Path, own: Collection[str]) -> None:
    """Raise ItuneError if a folder that is to be replaced contains a file whose name is not in `own`."""
    if foreign := sorted(child.name for child in folder.iterdir() if child.name not in own):
        raise ItuneError(f"{folder} holds {foreign[0]}, which would be lost: move it away, or choose another folder")


def listed_files(manifest: Path) -> set[str]:
    """Return the names of a manifest and of the `files` that it lists; none if it cannot be read."""
    try:
        files = json.loads(manifest.read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {manifest.name, *files} if isinstance(files, dict) else set()


@contextmanager
def only_writer(lock_file: Path, busy: str, error: type[ItuneError] = ItuneError) -> Iterator[None]:
    """Hold a lock during the block, then delete its file.

    Raises `error` if another process holds the lock (with the message `busy`), or the file cannot be written.
    """
    from filelock import FileLock, Timeout  # a dependency of training alone

    lock = FileLock(lock_file)
    with reading(lock_file, error, mend="choose another folder to write to"):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise error(busy) from None
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)
        lock.release()


def _temporary(path: Path) -> Path:
    # Random, because in a container every process may have the same id, and a killed one may have left its file.
    return path.with_name(f".{path.name[:_NAME_LENGTH]}.{secrets.token_hex(4)}.tmp")
