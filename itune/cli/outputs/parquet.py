"""A Parquet file: the columns of the CSV, and the candidates."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...files import atomic_path
from ...runtime.errors import ImageError
from .. import common
from .base import Captioned, Writer

_ROWS = 1000
"""Rows that are kept in memory and written together."""


class ParquetFile(Writer):
    """Results in a Parquet file, which appears whole at the end; also if the user ends the run early."""

    def __init__(self, path: Path) -> None:
        """Raise ItuneError without pyarrow."""
        common.require("parquet", "pyarrow")
        self.path = path
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        import pyarrow as pa
        from pyarrow import parquet

        text, score = pa.string(), pa.float64()
        candidates = pa.list_(pa.struct([("caption", text), ("score", score)]))
        self._schema = pa.schema(
            [("image", text), ("caption", text), ("score", score), ("error", text), ("candidates", candidates)]
        )
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            file = stack.enter_context(temporary.open("wb"))
            self._writer = stack.enter_context(parquet.ParquetWriter(file, self._schema))
            self._stack = stack.pop_all()
        return self

    def write(self, captioned: Captioned) -> None:
        """As in Writer."""
        row: dict[str, Any] = {"image": captioned.image.encode(errors="backslashreplace").decode()}
        if isinstance(captioned.result, ImageError):
            row["error"] = str(captioned.result)
        else:
            row |= {name: asdict(captioned.result)[name] for name in ("caption", "score", "candidates")}
        self._rows.append(row)
        if len(self._rows) == _ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt | SystemExit):
            with self._stack:
                self._flush()
        else:
            self._stack.__exit__(kind, error, traceback)
