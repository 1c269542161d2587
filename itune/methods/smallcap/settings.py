"""SmallCap's training settings and its part of the checkpoint, without torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from ...checkpoint import CheckpointConfig
from ..settings import Count, MethodSettings


class SmallCapSettings(MethodSettings):
    """Settings of SmallCap's cross-attention (Ramos et al. 2023)."""

    model_config = ConfigDict(title="Method SmallCap")
    retrieves = True
    other_defaults: ClassVar[dict[str, Any]] = {"num_beams": 3}

    heads: Count | None = None
    """Attention heads of each layer. Default: as many as the language model has."""
    attention_width: Count = 16
    """Width of each head's queries, keys and values; the paper uses 64, 32, 16, 8 and 4."""


class SmallCapCheckpoint(CheckpointConfig):
    """`itune.json` of SmallCap; its tensors are `layers.{i}.{norm,query,key,value,output}.{weight,bias}`."""

    method: Literal["smallcap"] = "smallcap"
    heads: Count
    attention_width: Count
    """Width of each head's queries, keys and values."""
