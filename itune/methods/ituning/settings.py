"""I-Tuning's training settings and its part of the checkpoint, without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from ...checkpoint import CheckpointConfig
from ..settings import Count, MethodSettings, Positive, Whole


class ITuningSettings(MethodSettings):
    """Settings of I-Tuning's adapters."""

    model_config = ConfigDict(title="Method I-Tuning")
    retrieves = True

    bottleneck: Count | None = None
    """Adapter width r. Default: half the language model's width, which gives the paper's parameter counts."""
    heads: Count | None = 1
    """Attention heads of each adapter. Default: 1, as in the paper; SmallCap: as many as the language model has."""
    lambda_: Positive = 1.0
    """Scale of the adapter's output: the paper's lambda, at least 1 there."""
    score_scale: Positive | None = None
    """Factor on Q K^T. Default: 1/sqrt(bottleneck / heads) (ours); the paper's literal 1 saturates the softmax."""
    first_adapter_layer: Whole = 0
    """I-Tuning Dropping: decoder layers below this one have no adapter and store no activations."""


class ITuningCheckpoint(CheckpointConfig):
    """`itune.json` of an I-Tuning checkpoint."""

    method: Literal["i-tuning"] = "i-tuning"
    bottleneck: Count
    heads: Count = 1
    lambda_: Positive = Field(default=1.0, validation_alias="lambda", serialization_alias="lambda")
    score_scale: Positive
    first_adapter_layer: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.text.begin is None:
            raise ValueError("text.begin is null, but a caption needs a first token")
        if self.bottleneck % self.heads:
            raise ValueError(f"bottleneck {self.bottleneck} is not a multiple of heads {self.heads}")
        return self
