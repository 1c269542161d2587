"""What the checkpoint (`itune.json`) and the bundle (`bundle.json`) both say about pixels and text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Size = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
Method = Literal["i-tuning", "clipcap"]
"""How a frozen language model is given the image."""
Triple = tuple[float, float, float]


class Settings(BaseModel):
    """Base of every model that is read from JSON: immutable, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ImageSettings(Settings):
    """How a decoded RGB photo becomes the vision tower's uint8 pixels [H, W, 3], and their normalisation.

    `shortest_edge` resizes the shorter side to `size[0]`, keeping the aspect ratio, then crops `crop` from the
    centre (CLIP); `squash` resizes to `size` = (height, width) outright. The tower sees
    `(pixels / 255 - mean) / std`, which the exported vision graph does itself.
    """

    size: Size
    resize: Literal["shortest_edge", "squash"] = "shortest_edge"
    crop: Size | None = None
    mean: Triple
    std: Triple
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the pixels that the tower receives."""
        return self.crop or self.size


class TextSettings(Settings):
    """How captions are written: `begin` [prompt] caption `end`, both ends being single tokens."""

    prompt: str = ""
    begin: str | None = "<|endoftext|>"
    """None: nothing stands between the image's embeddings and the prompt."""
    end: str = "<|endoftext|>"
    lower: bool = False
    strip_period: bool = False
