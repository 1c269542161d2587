"""Recover a folder whose writer was killed between two renames, where the system cannot exchange folders in one step.

New content is written to `.NAME.XXXXXXXX.tmp` beside the folder, and its writer holds a lock on that. The old content
waits in `.NAME.XXXXXXXX.old`.
"""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path

_NAME_LENGTH = 40
"""Characters of a target's name in that of its temporary folder: names may be as long as the file system allows."""


def temporary_stem(target: Path) -> str:
    """Beginning of the names of the temporary folders of `target`, different for each target."""
    name = target.name
    if len(name) > _NAME_LENGTH:
        name = f"{name[: _NAME_LENGTH - 9]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    return f".{name}"


def lock(path: Path) -> int | None:
    """Lock a file or folder until the descriptor is closed; None if it is in use, or cannot be locked here."""
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except (ImportError, OSError):  # Windows has no fcntl
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def recover_folder(folder: Path) -> None:
    """Restore `folder` if it is missing and a killed writer, not a living one, left its content beside it.

    Raises OSError if the content cannot be renamed.
    """
    if folder.exists():
        return
    for old in sorted(folder.parent.glob(f"{glob.escape(temporary_stem(folder))}.{8 * '?'}.old")):
        new = old.with_suffix(".tmp")  # complete, because the old folder was moved away after it was written
        found = new if new.exists() else old
        if (held := lock(found)) is not None:
            try:
                found.rename(folder)
            finally:
                os.close(held)
            return
