"""The names that option fields have on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .runtime.errors import reason

if TYPE_CHECKING:
    from pydantic import ValidationError


def flag(field: str) -> str:
    """The command-line flag of an option field."""
    name = field.strip("_").replace("_", "-")
    return f"--{name}" if len(name) > 1 else f"-{name}"


def refusal(error: ValidationError) -> str:
    """The first error in one sentence, which names the flag and the value."""
    location = error.errors()[0]["loc"]
    return f"{flag(str(location[0]))}: {reason(error).partition(': ')[2]}" if location else reason(error)
