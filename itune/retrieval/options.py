"""The options of `itune-datastore build` and `add`; nothing here imports PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from ..runtime.settings import Settings

Kind = Literal["text", "image"]
Pooling = Literal["mean", "projection"]


class CaptionSource(Settings):
    """The captions to put into a datastore."""

    captions: Path
    """Captions: Flickr8k/30k token file or its folder, Karpathy JSON, COCO or NoCaps annotations, or JSONL."""
    images: Path | None = None
    """Folder of the photos, if not beside the captions."""
    split: str = "train"
    """Split whose captions are taken: train, dev, test, or all."""
    cache_features: Path | None = None
    """Feature cache to read the photos' embeddings from and to fill; itune-train may share it."""


class DatastoreOptions(Settings):
    """How a datastore is built."""

    kind: Kind | None = None
    """text: embed the captions, by the text tower of a full CLIP checkpoint. image: embed the photos, by any tower, and
    retrieve their captions. [default: text if the encoder has a text tower]"""
    pooling: Pooling | None = None
    """A photo's embedding: the mean of its visual embeddings, or CLIP's projection. [default: the projection if the
    encoder has one]"""
    center: bool | None = None
    """Subtract the mean of the embeddings. [default: with --kind image]"""
    force: bool = False
    """Replace a datastore."""

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.kind == "text" and self.pooling == "mean":
            raise ValueError("--kind text compares captions to CLIP's projection of a photo; drop --pooling mean")
        return self
