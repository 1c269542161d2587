"""Read JSON files that may come from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .runtime.errors import ItuneError, reading


def read_json(path: Path, error: type[ItuneError] = ItuneError, mend: str = "copy it again") -> Any:
    """The content of a UTF-8 JSON file; anything that cannot be parsed, however deeply nested, raises `error`."""
    with reading(path, error, mend):
        return json.loads(path.read_bytes())
