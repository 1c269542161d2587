"""Text, JSON Lines and CSV: a record for each image, on standard output or in a file that a later run can continue."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from ...files import unwritable
from ...runtime.errors import ImageError, ItuneError, printable, reading
from .. import common
from .base import Captioned, Writer

COLUMNS = ("image", "caption", "score", "error")
_JSON_START = b'{"image": '


class Format(Protocol):
    """How a result becomes a record, and what that says about its image."""

    header: str

    def record(self, captioned: Captioned) -> str:
        """The result as a record, with its line break."""

    def records(self, file: BinaryIO) -> Iterator[bytes]:
        """The records in a file, without a last one that was cut off."""

    def is_torn(self, end: bytes) -> bool:
        """Whether the rest of a file can be the beginning of a record of ours."""

    def image(self, record: str) -> str:
        """The image that a record is about. May raise anything if the record is none of ours."""

    def key(self, image: str) -> str:
        """An image's name as `image` returns it."""


class JsonLines:
    """A JSON object per line (https://jsonlines.org)."""

    header = ""

    def record(self, captioned: Captioned) -> str:
        """As in Format."""
        from ...caption_json import caption_json

        return json.dumps(caption_json(**vars(captioned))) + "\n"

    def records(self, file: BinaryIO) -> Iterator[bytes]:
        """As in Format."""
        return (line for line in file if line.endswith(b"\n"))

    def is_torn(self, end: bytes) -> bool:
        """As in Format."""
        return end.startswith(_JSON_START) or _JSON_START.startswith(end)

    def image(self, record: str) -> str:
        """As in Format."""
        return str(json.loads(record)["image"])

    def key(self, image: str) -> str:
        """As in Format: JSON keeps any name."""
        return image


class Csv:
    """CSV after RFC 4180, with a header. Always valid UTF-8: other bytes of a name become escapes."""

    header = ",".join(COLUMNS) + "\r\n"

    def record(self, captioned: Captioned) -> str:
        """As in Format."""
        result = captioned.result
        row = ("", "", str(result)) if isinstance(result, ImageError) else (result.caption, result.score, "")
        out = io.StringIO()
        csv.writer(out).writerow([self.key(captioned.image), *row])
        return out.getvalue()

    def records(self, file: BinaryIO) -> Iterator[bytes]:
        """As in Format; a field in quotation marks may contain line breaks."""
        lines: list[bytes] = []
        marks = 0
        for line in file:
            lines.append(line)
            marks += line.count(b'"')
            if line.endswith(b"\n") and marks % 2 == 0:
                yield b"".join(lines)
                lines.clear()

    def is_torn(self, end: bytes) -> bool:
        """As in Format. A stray quotation mark makes one record of many."""
        return b"\r\n" not in end

    def image(self, record: str) -> str:
        """As in Format."""
        (row,) = csv.reader([record], strict=True)
        if len(row) != len(COLUMNS):
            raise ValueError(f"{len(row)} columns")
        return row[0]

    def key(self, image: str) -> str:
        """As in Format."""
        return image.encode(errors="backslashreplace").decode()


class Printed(Writer):
    """Records on standard output, each as soon as it is known."""

    def __init__(self, format: Format, *, beside_progress: bool) -> None:
        self.format, self.beside_progress = format, beside_progress

    def __enter__(self) -> Self:
        if self.format.header:
            self._emit(self.format.header)
        return self

    def write(self, captioned: Captioned) -> None:
        """As in Writer."""
        self._emit(self.format.record(captioned))

    def _emit(self, record: str) -> None:
        text = record.removesuffix("\n")
        if sys.stdout.isatty():
            text = printable(text.removesuffix("\r"))
        common.emit(text, beside_progress=self.beside_progress)


class Captions(Writer):
    """Captions as text on standard output, errors on standard error."""

    def __init__(self, *, named: bool, beside_progress: bool) -> None:
        self.named, self.beside_progress = named, beside_progress

    def write(self, captioned: Captioned) -> None:
        """As in Writer."""
        if isinstance(captioned.result, ImageError):
            print(f"itune-run: {captioned.result}", file=sys.stderr)
            return
        caption = printable(captioned.result.caption)
        line = f"{printable(captioned.image)}\t{caption}" if self.named else caption
        common.emit(line, beside_progress=self.beside_progress)


class RecordFile(Writer):
    """Records in a file, each on the disk's side of the system as soon as it is known, so that no kill loses them.

    With `resume`, the file goes on where an earlier run stopped, and a last record that was cut off goes.
    """

    def __init__(self, path: Path, format: Format, *, resume: bool, overwrite: bool) -> None:
        """Raise ItuneError if the file exists and may be neither continued nor replaced, or holds something else."""
        self.path, self.format = path, format
        self._known: set[str] = set()
        self._length = 0
        """Bytes to keep."""
        if path.exists() and path.stat().st_size and not overwrite:
            if not resume:
                raise ItuneError(f"--output {path} exists: --resume continues it, --overwrite replaces it")
            self._read()

    def _read(self) -> None:
        with reading(self.path, mend="name another --output"), self.path.open("rb") as file:
            for number, record in enumerate(self.format.records(file), 1):
                self._length += len(record)
                if number == 1 and self.format.header:
                    if record.decode("utf-8-sig") != self.format.header:
                        raise ValueError(f"does not begin with {self.format.header.rstrip()} and a CRLF")
                elif record.strip():
                    with reading(f"{self.path}: record {number}", mend="it is not of itune-run: name another --output"):
                        self._known.add(self.format.image(record.decode()))
            file.seek(self._length)
            if not self.format.is_torn(file.read()):
                raise ValueError("does not end with a record of itune-run")

    def has(self, image: str) -> bool:
        """As in Writer."""
        return self.format.key(image) in self._known

    def __enter__(self) -> Self:
        try:
            self._file = self.path.open("ab")
            self._file.truncate(self._length)
            if not self._length:
                self._append(self.format.header)
        except OSError as error:
            raise unwritable(self.path, error) from error
        return self

    def write(self, captioned: Captioned) -> None:
        """As in Writer."""
        self._append(self.format.record(captioned))

    def _append(self, record: str) -> None:
        try:
            self._file.write(record.encode())
            self._file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what could not be written was reported
            os.fsync(self._file.fileno())
        with suppress(OSError):
            self._file.close()
