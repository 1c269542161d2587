"""Callbacks that report progress."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Called with (items done, items in total)."""
OnStage = Callable[[str, int, int], None]
"""Called with (name of the stage, items done, items in total)."""


def silent(*_: object) -> None:
    """Report nothing."""
