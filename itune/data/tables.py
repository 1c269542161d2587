"""Caption tables: CSV, TSV and the like, with or without a header line."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from ..runtime.image import SUFFIXES

DELIMITERS = (",", "\t", ";", "|")
IMAGE_NAMES = ("image", "file_name", "filename", "filepath", "image_path", "image_name", "image_id", "path", "photo")
"""Fields with the photo's name, the most specific first."""
CAPTION_NAMES = ("captions", "caption", "text", "raw", "comment", "description", "sentence")
"""Fields with a caption, or a list of captions."""
_NUMBERED = re.compile(rf"(?:{'|'.join(CAPTION_NAMES)})[ _-]?\d+")
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
        captions = [i for i, name in enumerate(names) if name in CAPTION_NAMES or _NUMBERED.fullmatch(name)]
        image = next((names.index(name) for name in IMAGE_NAMES if name in names), None)
        if captions and image is not None:
            split = names.index("split") if "split" in names else None
            return Table(delimiter, True, image, tuple(captions), split)
        photos = [name.endswith(tuple(SUFFIXES)) for name in names[:2]]
        if photos == [True, False]:
            return Table(delimiter, False, 0, (1,))
    return None


def read_table(text: str, table: Table) -> Iterator[Row]:
    """Yield the rows of a table that are not blank. Raises ValueError for a row with too few columns."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=table.delimiter, skipinitialspace=True, strict=True)
    wanted = max(table.image, table.split or 0, *table.captions)
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
        if len(cells) > width and table.captions[-1] == width - 1:  # a caption with an unquoted delimiter
            cells[width - 1 :] = [f"{table.delimiter} ".join(cells[width - 1 :])]
        captions = tuple(caption for place in table.captions for caption in _captions(cells[place]))
        split = None if table.split is None else cells[table.split].strip() or None
        yield Row(reader.line_num, cells[table.image], captions, split)


def _captions(cell: str) -> Sequence[str]:
    """The captions in a cell: one, or a JSON list of them."""
    if cell.lstrip().startswith("["):
        try:
            return _LIST.validate_json(cell)
        except ValueError:
            pass
    return [cell]
