"""Which photos to caption: files, folders, globs, stdin, lists of names, and what appears in a folder."""

from __future__ import annotations

import codecs
import glob
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from mimetypes import guess_type
from pathlib import Path

from ..runtime.errors import ItuneError, printable, reading
from .program import Options, Switch

STDIN = "-"
_POLL = 1.0
"""Seconds between two looks at a watched folder."""


class PhotoOptions(Options, title="Photos"):
    """Which photos, beside the arguments."""

    recursive: Switch = False
    """Take the photos in sub-folders, too."""
    from_file: Path | None = None
    """LIST: a file with the path of a photo on each line; - is stdin."""
    null: Switch = False
    """The paths in LIST end in NUL characters, as of `find -print0`."""
    watch: Switch = False
    """Keep running, and caption what appears in the folders, until Ctrl-C."""

    def find(self, arguments: Sequence[str]) -> list[str]:
        """The photos that there are now; say on stderr what else lies in the folders.

        Raises:
            ItuneError: the list cannot be read, or options do not fit together.
        """
        if self.null and self.from_file is None:
            raise ItuneError("--null needs --from-file")
        if self.watch and (self.from_file or not all(Path(each).is_dir() for each in arguments)):
            raise ItuneError("--watch takes folders: leave out --from-file and files")
        sources = []
        for argument in arguments:
            found = Found.at(argument, recursive=self.recursive)
            sources += found.sources
            if found.skipped:
                print(f"itune-run: {printable(found.place)}: skipped {found.summary}", file=sys.stderr)
        listed = [] if self.from_file is None else read_list(self.from_file, null=self.null)
        from_stdin = STDIN in sources or self.from_file == Path(STDIN)
        if from_stdin and sys.stdin is None:
            raise ItuneError("-: standard input is closed")
        if STDIN in sources and self.from_file == Path(STDIN):
            raise ItuneError("-: standard input is either a photo or the list of --from-file")
        return sources + listed


def read_list(path: Path, *, null: bool) -> list[str]:
    """The paths in a list, as they are: neither globs nor "-" mean anything else there. Empty lines do not count.

    Raises ItuneError if the list cannot be read.
    """
    with reading(f"--from-file {path}", mend="name another list"):
        content = sys.stdin.buffer.read() if path == Path(STDIN) else path.read_bytes()
    content = content.removeprefix(codecs.BOM_UTF8)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ItuneError(f"--from-file {path}: it is in UTF-16: save it as UTF-8")
    lines = content.split(b"\0") if null else [line.removesuffix(b"\r") for line in content.split(b"\n")]
    if not null and b"\0" in content:
        raise ItuneError(f"--from-file {path}: there are NUL characters in it: add --null")
    names = (os.fsdecode(line) for line in lines if line)
    return [os.path.join(".", name) if name == STDIN else name for name in names]  # noqa: PTH118


def watch(folders: Iterable[str], *, recursive: bool, seconds: float = _POLL) -> Iterator[list[str]]:
    """Yield the photos in folders, then those that appear or change, until the caller stops.

    A photo is yielded once its size and time were the same at two looks, `seconds` apart: nobody writes it any more.
    Looking again works on network drives, which report no changes.

    Raises:
        ItuneError: a folder is none, or is gone.
    """
    known: dict[str, tuple[int, int]] = {}
    before: dict[str, tuple[int, int]] = {}
    while True:
        now: dict[str, tuple[int, int]] = {}
        for folder in folders:
            with reading(folder, mend="--watch needs a folder"):
                for photo in photos_in(Path(folder), recursive, Counter()):
                    try:
                        state = photo.stat()
                    except OSError:  # it has gone since
                        continue
                    now[str(photo)] = state.st_size, state.st_mtime_ns
        ready = {name: state for name, state in now.items() if state[0] and state == before.get(name)}
        if appeared := [name for name, state in ready.items() if known.get(name) != state]:
            yield appeared
        known = {name: known.get(name, (0, 0)) for name in now} | ready
        before = now
        time.sleep(seconds)


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
        skipped = Counter[tuple[str, str]]()
        sources = [str(path) for path in photos_in(folder, recursive, skipped)]
        return cls(str(folder), sources or [str(folder)], +skipped)


def photos_in(folder: Path, recursive: bool, skipped: Counter[tuple[str, str]]) -> Iterator[Path]:
    """Yield the photos in a folder, sorted by name, and count what else is there."""
    from ..runtime.image import HEIF_SUFFIXES, SUFFIXES

    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        inside = path.relative_to(folder).parts
        if any(part.startswith(".") for part in inside):
            continue
        if path.is_dir():
            skipped["sub-folder", "add --recursive"] += not recursive
            skipped["linked folder", "name it"] += recursive and path.is_symlink()
        elif path.suffix.lower() in SUFFIXES and not _blocks(path):
            yield path
        elif path.suffix.lower() in HEIF_SUFFIXES:
            skipped[f"{path.suffix} file", "pip install 'itune-captioner[heif]'"] += 1
        elif path.suffix != ".xmp" and (guess_type(path.name)[0] or "").partition("/")[0] not in (
            "text",
            "application",
        ):
            skipped[f"{path.suffix} file" if path.suffix else "other file", ""] += 1


def _blocks(path: Path) -> bool:
    """Whether reading it may wait forever, as from a named pipe."""
    return path.is_fifo() or path.is_socket() or path.is_char_device() or path.is_block_device()
