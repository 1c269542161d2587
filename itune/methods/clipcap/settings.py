"""What is set in training and stored in a checkpoint, without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ...checkpoint import CheckpointConfig


class ClipCapCheckpoint(CheckpointConfig):
    """ClipCap's."""

    method: Literal["clipcap"] = "clipcap"
    mapper: Literal["transformer", "mlp"]
    prefix_length: int = Field(gt=0)
    clip_length: int | None = Field(default=None, gt=0)
    mapper_layers: int | None = Field(default=None, gt=0)
    mapper_heads: int | None = Field(default=None, gt=0)
    pooling: Literal["projected", "cls", "mean"]
    projected_width: int | None = Field(default=None, gt=0)
    """Width of CLIP's projected embedding; with `pooling` projected only."""
    layer_norm_eps: float = Field(default=1e-5, gt=0)
    """Of the layer norm before CLIP's projection."""
    normalize: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.mapper == "transformer" and None in (self.clip_length, self.mapper_layers, self.mapper_heads):
            raise ValueError("mapper transformer needs clip_length, mapper_layers and mapper_heads")
        if (self.pooling == "projected") != (self.projected_width is not None):
            raise ValueError("pooling projected and projected_width: give both or neither")
        return self
