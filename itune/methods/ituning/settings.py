"""What is set in training and stored in a checkpoint, without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ...checkpoint import CheckpointConfig


class ITuningCheckpoint(CheckpointConfig):
    """I-Tuning's."""

    method: Literal["i-tuning"] = "i-tuning"
    bottleneck: int = Field(gt=0)
    heads: int = Field(default=1, gt=0)
    lambda_: float = Field(default=1.0, validation_alias="lambda", serialization_alias="lambda")
    score_scale: float
    first_adapter_layer: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _begins(self) -> Self:
        if self.text.begin is None:
            raise ValueError("text.begin is null: a caption needs a token to begin with")
        return self
