"""ClipCap's training settings and its part of the checkpoint, without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from ...checkpoint import CheckpointConfig
from ..settings import Count, MethodSettings

TRANSFORMER_FIELDS = frozenset({"clip_length", "mapper_layers", "mapper_heads"})
"""Settings that the MLP mapper does not use."""


class ClipCapSettings(MethodSettings):
    """Settings of ClipCap's mapper (Mokady et al. 2021); the defaults are its paper's."""

    model_config = ConfigDict(title="Method ClipCap")

    mapper: Literal["transformer", "mlp"] = "transformer"
    """Network that maps an image's embedding to the prefix; the paper uses the transformer when GPT-2 is frozen."""
    prefix_length: Count = 10
    """Embeddings before the caption."""
    clip_length: Count = 10
    """Transformer mapper: vectors that the image's embedding is projected to."""
    mapper_layers: Count = 8
    """Transformer mapper: number of layers."""
    mapper_heads: Count = 8
    """Transformer mapper: attention heads."""
    pooling: Literal["projected", "cls", "mean"] | None = None
    """Image embedding that the mapper reads: CLIP's projected one (as in the paper), the CLS position, or the mean of
    all positions. Default: the first that the tower has; mean for an ONNX tower, which need not have a CLS position."""
    normalize: bool = False
    """Scale that embedding to length 1 (an option of the authors' code, off by default there too)."""


class ClipCapCheckpoint(CheckpointConfig):
    """`itune.json` of a ClipCap checkpoint."""

    method: Literal["clipcap"] = "clipcap"
    mapper: Literal["transformer", "mlp"]
    prefix_length: Count
    clip_length: Count | None = None
    mapper_layers: int | None = Field(default=None, gt=0, le=1024)
    mapper_heads: Count | None = None
    pooling: Literal["projected", "cls", "mean"]
    projected_width: Count | None = None
    """Width of CLIP's projected embedding; only with `pooling` projected."""
    layer_norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of the layer norm before CLIP's projection."""
    normalize: bool = False

    @model_validator(mode="after")
    def _complete(self) -> Self:
        wrong = None
        if self.mapper == "transformer" and None in (self.clip_length, self.mapper_layers, self.mapper_heads):
            wrong = "mapper transformer needs clip_length, mapper_layers and mapper_heads"
        elif (self.pooling == "projected") != (self.projected_width is not None):
            wrong = "pooling projected and projected_width: give both or neither"
        if wrong:
            raise ValueError(wrong)
        return self
