"""The photos that an argument stands for: a file, a folder, a glob or stdin."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from mimetypes import guess_type
from pathlib import Path

STDIN = "-"


def expand(arguments: Iterable[str]) -> list[str]:
    """The photos of several arguments."""
    return [source for argument in arguments for source in Found.at(argument).sources]


@dataclass(frozen=True)
class Found:
    """The photos that an argument stands for, and what else lies in the folder."""

    place: str
    sources: list[str]
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of files by what they are, and by what the user can do about them."""

    @property
    def summary(self) -> str:
        """What was skipped, such as "3 .psd files, 1 sub-folder (add --recursive)"."""
        return ", ".join(
            f"{count} {kind}{'s' * (count > 1)}{mend and f' ({mend})'}"
            for (kind, mend), count in sorted(self.skipped.items())
        )

    @classmethod
    def at(cls, argument: str, *, recursive: bool = False) -> Found:
        """Find the photos in a folder, sorted by name, or the files that match a glob.

        An argument that is neither, or that has no photos, stays, so that its error names it.
        """
        path = Path(argument)
        try:
            if argument == STDIN or path.is_file():
                return cls(argument, [argument])
            if path.is_dir():
                return cls._in_folder(path, recursive)
            matches = glob.glob(argument, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
            return cls(argument, sorted(match for match in matches if Path(match).is_file()) or [argument])
        except OSError:
            return cls(argument, [argument])  # opening it reports the error

    @classmethod
    def _in_folder(cls, folder: Path, recursive: bool) -> Found:
        from ..runtime.image import HEIF_SUFFIXES, SUFFIXES

        sources, skipped = [], Counter[tuple[str, str]]()
        for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
            inside = path.relative_to(folder).parts
            if any(part.startswith(".") for part in inside):
                continue
            if path.is_dir():
                skipped["sub-folder", "add --recursive"] += not recursive
                skipped["linked folder", "name it"] += recursive and path.is_symlink()
            elif path.suffix.lower() in SUFFIXES and not _blocks(path):
                sources.append(str(path))
            elif path.suffix.lower() in HEIF_SUFFIXES:
                skipped[f"{path.suffix} file", "pip install 'itune-captioner[heif]'"] += 1
            elif (guess_type(path.name)[0] or "").partition("/")[0] not in ("text", "application"):
                skipped[f"{path.suffix} file" if path.suffix else "other file", ""] += 1
        return cls(str(folder), sources or [str(folder)], +skipped)


def _blocks(path: Path) -> bool:
    """Whether reading it may wait forever, as from a named pipe."""
    return path.is_fifo() or path.is_socket() or path.is_char_device() or path.is_block_device()
