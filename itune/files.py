"""Write files and folders atomically, without replacing files of others; hash and lock them.

What is being written lies in a hidden folder beside its target, which a lock marks as in use: the next writer of the
target deletes such folders of dead processes.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .runtime.errors import ItuneError, reading, reason
from .runtime.recovery import lock, recover_folder, temporary_stem

_UMASK = os.umask(0o022)
os.umask(_UMASK)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SMALL = ".itune-tmp"
"""Suffix of the temporary files of `write_small`."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


class NoSpaceError(ItuneError):
    """The disk, or the user's share of it, is full: whatever comes next would fail as well."""


def hash_files(paths: list[Path]) -> str:
    """SHA-256 of the files' contents, concatenated in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_folder(folder: Path, own: Collection[str] | None = None) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` if the block succeeds and is deleted otherwise.

    Files of the old folder that are not in `own`, relative to it, move into the new one; None: all are its own. A
    symbolic link stays; the folder that it points to is replaced. Raises ItuneError if `folder` cannot be written.
    """
    folder = folder.resolve()
    with reading(folder, ItuneError, mend="choose another folder to write to"):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is a file")
        recover_folder(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(folder) as temporary:
        try:
            yield temporary
        except OSError as error:
            if error.errno in _FULL:
                raise unwritable(folder, error) from error
            raise
        except ItuneError as error:  # users know the folder by its own name
            raise type(error)(str(error).replace(str(temporary), str(folder))) from error
        with reading(folder, ItuneError, mend="choose another folder to write to"):
            _flush(temporary)
            if not folder.exists():
                temporary.rename(folder)
            elif not _exchange(temporary, folder):
                _replace(folder, temporary)
            for path in foreign_files(temporary, own) if own is not None else ():
                target = folder / path.relative_to(temporary)
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.rename(target)
            _flush(folder.parent, recursive=False)


def _replace(folder: Path, temporary: Path) -> None:
    """Exchange two folders in three steps; `recover_folder` mends an interruption."""
    old = temporary.with_suffix(".old")
    folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    old.rename(temporary)


@contextmanager
def staged_folder(output: Path, *, force: bool, written: Callable[[Path], Collection[str]]) -> Iterator[Path]:
    """Yield a temporary folder that becomes the new folder `output`; with `force` it replaces an earlier output.

    `written` says which files, relative to `output`, an earlier run wrote there; none if something else is there.
    Raises ItuneError if `output` may not be replaced, or appears before the block ends.
    """
    output = output.absolute()
    recover_folder(output)
    replaces, own = output.exists(), written(output)
    if replaces and not (force and own):
        why = "exists; --force replaces it" if own else "exists and is not an earlier output"
        raise ItuneError(f"{output} {why}: choose another --output")
    if replaces:
        refuse_foreign(output, own)
    with atomic_folder(output, own) as folder:
        yield folder
        if output.exists() and not replaces:
            raise ItuneError(f"{output} appeared meanwhile: choose another --output")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block succeeds and is deleted otherwise.

    Raises ItuneError, naming `path`, if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(path) as folder:
            temporary = folder / path.name
            yield temporary
            temporary.chmod(0o666 & ~_UMASK)  # some libraries make files that only their owner can read
            _flush(folder)
            temporary.replace(path)
            _flush(path.parent, recursive=False)
    except BrokenPipeError:  # of standard output, which the block may write as well
        raise
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> ItuneError:
    """The error for a path that cannot be written."""
    kind = NoSpaceError if error.errno in _FULL else ItuneError
    return kind(f"{path}: {reason(error)}; make room, or choose another place")


def write_small(path: Path, content: bytes) -> None:
    """Write a small file atomically, one of many in its folder.

    Cheaper than `atomic_path`: no folder, no look at the others. `sweep_small` deletes what a killed process left.
    Raises ItuneError, naming `path`, if it cannot be written.
    """
    temporary = path.with_name(f"{temporary_stem(path)}.{secrets.token_hex(4)}{_SMALL}")
    held = None
    try:
        with temporary.open("xb") as file:
            held = lock(temporary)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):  # names may be too long
            temporary.unlink(missing_ok=True)
        if held is not None:
            os.close(held)


def sweep_small(folder: Path) -> None:
    """Delete the temporary files in a folder that belong to no living `write_small`."""
    for left in folder.glob(f".*{_SMALL}"):
        if (held := lock(left)) is not None:
            left.unlink(missing_ok=True)
            os.close(held)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write `content` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, error: type[ItuneError] = ItuneError, mend: str = "copy it again") -> Any:
    """The content of a UTF-8 JSON file; anything that cannot be parsed, however deeply nested, raises `error`."""
    with reading(path, error, mend):
        return json.loads(path.read_bytes())


def foreign_files(folder: Path, own: Collection[str]) -> list[Path]:
    """The files in a folder and below it whose paths, relative to it, are not in `own`."""
    return sorted(
        path
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(folder).as_posix() not in own
    )


def refuse_foreign(folder: Path, own: Collection[str]) -> None:
    """Raise ItuneError if a folder that is to be replaced contains a file that is not in `own`."""
    if foreign := foreign_files(folder, own):
        raise ItuneError(
            f"{folder} holds {foreign[0].relative_to(folder)}, which would be lost: move it away, or choose another "
            "folder"
        )


def listed_files(manifest: Path) -> set[str]:
    """Return the names of a manifest and of the `files` that it lists; none if it cannot be read."""
    try:
        files = json.loads(manifest.read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
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
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(lock_file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise error(busy) from None
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)
        lock.release()


def refuse_link(path: Path) -> None:
    """Raise OSError for a symbolic link, which somebody may have placed there to have its target overwritten."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a link, which would be overwritten: delete it")


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """Make a folder beside `target` for its new content, locked until the block ends; delete those of the dead."""
    stem = temporary_stem(target)
    for left in target.parent.glob(f"{glob.escape(stem)}.{8 * '?'}.*"):
        dead = left.suffix == ".tmp" or (left.suffix == ".old" and target.exists())
        if dead and (held := lock(left)) is not None:
            _remove(left)
            os.close(held)
    # Random, because in a container every process may have the same id.
    folder = target.with_name(f"{stem}.{secrets.token_hex(4)}.tmp")
    with reading(target, ItuneError, mend="choose another place to write to"):
        folder.mkdir()
    held = lock(folder)
    try:
        yield folder
    finally:
        _remove(folder)
        if held is not None:
            os.close(held)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step, if the system can."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(first), os.fsencode(second)
    return rename is not None and not rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)


def _flush(folder: Path, *, recursive: bool = True) -> None:
    """Have a folder, and the files in it, written to the disk, so that a power failure loses neither old nor new."""
    for path in [*(folder.rglob("*") if recursive else ()), folder]:
        with suppress(OSError):  # some file systems cannot
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
