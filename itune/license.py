"""The terms that a captioner inherits from the weights that it was made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .runtime.errors import ItuneError, reading

LICENSE_FILE = "LICENSE.md"
"""Lies beside weights with terms of their own: in bundles, and in the folders that a restore writes."""


@dataclass(frozen=True)
class License:
    """The terms in a sentence, as in `itune.json` and `bundle.json`, and the text of LICENSE.md."""

    terms: str
    text: str


def find_license(folder: Path, terms: str | None = None) -> License | None:
    """The license in a folder of weights; `terms` sums it up where the folder's JSON does. None: it has none."""
    path = folder / LICENSE_FILE
    if not path.is_file():
        return None if terms is None else License(terms, f"{terms}\n")
    with reading(path, ItuneError, "copy the file again"):
        return License(terms or f"The terms in {LICENSE_FILE} apply.", path.read_text(encoding="utf-8"))


def inherit(licenses: Iterable[License | None]) -> License | None:
    """The licenses of several parts as one, each text once."""
    found: list[License] = []
    for license in licenses:
        if license is not None and not any(license.text in other.text for other in found):
            found.append(license)
    return License(" ".join(each.terms for each in found), "\n\n".join(each.text for each in found)) if found else None
