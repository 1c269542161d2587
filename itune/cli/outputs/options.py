"""The options that say which outputs there are, and all of them as one."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, Self

from cyclopts import Parameter

from ...files import NoSpaceError
from ...runtime.errors import ItuneError
from .. import common
from ..photos import STDIN
from ..program import Options, Switch
from .base import Captioned, SidecarError, Writer
from .lines import Captions, Csv, Format, JsonLines, Printed, RecordFile
from .parquet import ParquetFile
from .sidecars import Sidecars, TextSidecars, XmpSidecars

_SIDECARS: dict[str, type[Sidecars]] = {"txt": TextSidecars, "xmp": XmpSidecars}


class OutputOptions(Options, title="Output"):
    """Where the captions go; text on standard output by default."""

    json_: Switch = False
    """One JSON object per line instead of text."""
    csv: Switch = False
    """CSV with the columns image, caption, score and error instead of text."""
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None
    """FILE: write the JSON or CSV there instead of standard output."""
    parquet: Path | None = None
    """FILE: also write a Parquet file, with the candidates."""
    sidecar: tuple[Literal["txt", "xmp"], ...] = ()
    """txt or xmp: also write photo.txt or photo.jpg.xmp beside each photo.jpg."""
    resume: Switch = False
    """Skip photos that --output or --sidecar has, from a run that was stopped."""
    overwrite: Switch = False
    """Replace the file of --output and the captions in sidecars that exist."""

    def refuse_contradictions(self) -> None:
        """Raise ItuneError if options do not fit together."""
        wrong = {
            "--json and --csv: choose one": self.json_ and self.csv,
            "--output needs --json or --csv": self.output and not (self.json_ or self.csv),
            "--resume skips what exists, --overwrite replaces it: choose one": self.resume and self.overwrite,
            "--resume and --overwrite need --output or --sidecar": (self.resume or self.overwrite)
            and not (self.output or self.sidecar),
            "--resume cannot continue a Parquet file: leave out --parquet": self.resume and self.parquet,
        }
        for message, is_wrong in wrong.items():
            if is_wrong:
                raise ItuneError(message)


class Outputs(Writer):
    """Everything that the options ask for, as one writer."""

    def __init__(self, options: OutputOptions, *, named: bool, beside_progress: bool) -> None:
        """Raise ItuneError if options contradict each other, or a file may not or cannot be written.

        `named`: text has the image's name, too. `beside_progress`: a progress bar is on the same terminal.
        """
        options.refuse_contradictions()
        self.files = [
            (option, path) for option, path in (("--output", options.output), ("--parquet", options.parquet)) if path
        ]
        for option, path in self.files:
            common.check_writable(option, path, parents=False)
        format: Format = Csv() if options.csv else JsonLines()
        existing = {"resume": options.resume, "overwrite": options.overwrite}
        self.sidecars = [_SIDECARS[kind](**existing) for kind in dict.fromkeys(options.sidecar)]
        self._record_file = RecordFile(options.output, format, **existing) if options.output else None
        self._others: list[Writer] = []
        if options.parquet:
            self._others.append(ParquetFile(options.parquet))
        if not (options.json_ or options.csv):
            self._others.append(Captions(named=named, beside_progress=beside_progress))
        elif not options.output:
            self._others.append(Printed(format, beside_progress=beside_progress))

    def has(self, image: str) -> bool:
        """As in Writer: whether all files that a run can resume have the image."""
        return image != STDIN and bool(self._kept) and all(writer.has(image) for writer in self._kept)

    @property
    def _kept(self) -> list[Writer]:
        return [*self.sidecars, *([self._record_file] if self._record_file else [])]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for writer in (*self._kept, *self._others):
                stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def write(self, captioned: Captioned) -> None:
        """As in Writer. A sidecar that cannot be written is an error once all other outputs have the result."""
        failure: SidecarError | None = None
        for sidecar in self.sidecars:
            try:
                if not sidecar.has(captioned.image):
                    sidecar.write(captioned)
            except NoSpaceError:
                raise
            except ItuneError as error:
                failure = SidecarError(str(error))
        if self._record_file and not self._record_file.has(captioned.image):
            self._record_file.write(captioned)
        for writer in self._others:
            writer.write(captioned)
        if failure:
            raise failure

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
