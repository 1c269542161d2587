"""What is set in training and stored in a checkpoint, without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...checkpoint import CheckpointConfig


class SmallCapCheckpoint(CheckpointConfig):
    """SmallCap's; its tensors are `layers.{i}.{norm,query,key,value,output}.{weight,bias}`."""

    method: Literal["smallcap"] = "smallcap"
    heads: int = Field(gt=0)
    attention_width: int = Field(gt=0)
    """Width of each head's queries, keys and values."""
