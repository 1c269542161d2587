"""A verification's report: a check for every output, and the table of all checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter
from rich import box
from rich.table import Table

from ...runtime.errors import ItuneError


class VerificationError(ItuneError):
    """The graphs do not compute what the checkpoint computes."""


@dataclass(frozen=True)
class Check:
    """A row of the report."""

    output: str
    case: str
    """Where the difference is largest."""
    max_abs: float | None
    value: float
    limit: float
    passed: bool


CHECKS = TypeAdapter(list[Check])


def report_table(checks: Sequence[Check], title: str) -> Table:
    """The report as a table with a row for every output."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("output", no_wrap=True)
    table.add_column("largest in")  # shrinks in a narrow terminal, so that the verdict stays visible
    for header in ("max abs", "value", "limit", ""):
        table.add_column(header, justify="right", no_wrap=True, min_width=4)
    for check in checks:
        table.add_row(
            check.output,
            check.case,
            "" if check.max_abs is None else f"{check.max_abs:.2g}",
            f"{check.value:.2g}",
            f"{check.limit:.2g}",
            "ok" if check.passed else "FAIL",
            style=None if check.passed else "bold red",
        )
    return table
