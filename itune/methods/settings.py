"""What the training settings of all methods share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from ..runtime.settings import Settings

Whole = Annotated[int, Field(ge=0, le=2**32)]
Count = Annotated[int, Field(ge=1, le=2**32)]
Share = Annotated[float, Field(ge=0, le=0.99)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class MethodSettings(Settings):
    """Training settings of one method."""

    retrieves: ClassVar[bool] = False
    """Whether retrieved captions can stand in the prompt."""
    other_defaults: ClassVar[dict[str, Any]] = {}
    """This method's defaults for settings that all methods share."""
