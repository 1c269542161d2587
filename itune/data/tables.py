"""Caption tables: CSV, TSV and the like, with or without a header line."""

from __future__ import annotations

import ast
import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from ..runtime.image import SUFFIXES

DELIMITERS = (",", "\t", ";", "|")
IMAGE_NAMES = ("image", "file_name", "filename", "filepath", "image_path", "image_name", "path", "photo", "image_id")
"""Fields with the photo's name, the most specific first."""
CAPTION_NAMES = ("captions", "caption", "text", "raw", "comment", "description", "sentence")
"""Fields with a caption, or a list of captions."""
_LIST = TypeAdapter(list[str])


@dataclass(frozen=True)
class Table:
    """The layout of a table: the columns of the photo's name, of its captions, and of its split, if it has one."""

    delimiter: str
    header: bool
    image: int
    captions: tuple[int, ...]
    split: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    line: int
    image: str
    captions: tuple[str, ...]
    split: str | None


def table_layout(text: str) -> Table | None:
    """The layout that the first line of a text shows; None if the text is no caption table.

    Without a header, the first column is the photo's name, with the suffix of an image file, and the second a caption.
    """
    first = text.lstrip().split("\n", 1)[0].rstrip("\r")
    for delimiter in DELIMITERS:
        cells = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter), [])]
        names = [cell.lower() for cell in cells]
        captions = _caption_columns(names)
        image = next((names.index(name) for name in IMAGE_NAMES if name in names), None)
        if captions and image is not None:
            split = names.index("split") if "split" in names else None
            return Table(delimiter, True, image, tuple(captions), split)
        photos = [name.endswith(tuple(SUFFIXES)) for name in names[:2]]
        if photos == [True, False]:
            return Table(delimiter, False, 0, (1,))
    return None


def _caption_columns(names: Sequence[str]) -> list[int]:
    """The columns with the first of CAPTION_NAMES that is there, numbered ones included, such as caption1."""
    for wanted in CAPTION_NAMES:
        numbered = re.compile(rf"{wanted}(?:[ _-]?\d+)?")
        if found := [i for i, name in enumerate(names) if numbered.fullmatch(name)]:
            return found
    return []


def read_table(text: str, table: Table) -> Iterator[Row]:
    """Yield the rows of a table that are not blank. Raises ValueError for a row with too few columns."""
    reader = _reader(text, table.delimiter)
    wanted = max(table.image, table.split or 0, table.captions[0])  # a photo may have fewer captions than others
    several = len(table.captions) > 1
    width: int | None = None
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if width is None:
            width = len(cells) if table.header else 2
            if table.header:
                continue
        if len(cells) <= wanted:
            raise ValueError(f"line {reader.line_num} has {len(cells)} of {width} columns")
        surplus, place = len(cells) - width, table.captions[-1]
        if surplus > 0 and not (several and place < width - 1):  # a caption with an unquoted delimiter
            cells[place : place + surplus + 1] = [f"{table.delimiter} ".join(cells[place : place + surplus + 1])]
        elif surplus > 0:
            raise ValueError(f"line {reader.line_num} has {len(cells)} of {width} columns: quote its captions")
        places = [place for place in table.captions if place < len(cells) and (cells[place].strip() or not several)]
        captions = tuple(caption for place in places for caption in _captions(cells[place]))
        split = None if table.split is None else cells[table.split].strip() or None
        yield Row(reader.line_num, cells[table.image], captions, split)


def _reader(text: str, delimiter: str) -> Any:
    """A `csv.reader`; in tables with tabs, quotation marks that cannot be read as quoting are text."""
    options: dict[str, Any] = {"delimiter": delimiter, "skipinitialspace": True, "strict": True}
    if delimiter == "\t":
        try:
            deque(csv.reader(io.StringIO(text, newline=""), **options), maxlen=0)
        except csv.Error:
            options["quoting"] = csv.QUOTE_NONE
    return csv.reader(io.StringIO(text, newline=""), **options)


def _captions(cell: str) -> Sequence[str]:
    """The captions in a cell: one, or a list of them as JSON or Python writes it."""
    if cell.lstrip().startswith("["):
        for parse in (_LIST.validate_json, lambda text: _LIST.validate_python(ast.literal_eval(text.strip()))):
            with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                return parse(cell)
    return [cell]
