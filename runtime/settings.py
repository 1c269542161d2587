"""What the checkpoint (`itune.json`) and the bundle (`bundle.json`) both say about pixels and text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

_Pixels = Annotated[int, Field(gt=0, le=8192)]
Size = tuple[_Pixels, _Pixels]
"""(height, width)."""
Method = Literal["i-tuning", "clipcap", "smallcap"]
"""How a frozen language model is given the image."""
MOST_BEAMS = 1024
"""Each takes a row of the decoder and its cache."""
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """Base of every model that is read from JSON: immutable, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True)


class SearchDefaults(Settings):
    """The search options that a checkpoint and a bundle store, as in `transformers.generate`."""

    num_beams: Annotated[int, Field(ge=1, le=MOST_BEAMS)] = 5
    """Beams; 1 is greedy search."""
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 32
    """Longest caption in tokens, the end token included."""
    min_new_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Shortest caption in tokens."""
    length_penalty: _Finite = 1.0
    """Exponent of the length that divides the score: above 0 favours longer captions, below 0 shorter ones."""
    early_stopping: bool | Literal["never"] = False
    """True: stop once `num_beams` captions are finished. False: stop once no running beam scores better at its present
    length. "never": the same at the most favourable length."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """No n-gram of this size occurs twice; 0 is off."""
    repetition_penalty: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Above 1, tokens of the caption so far become less likely; 1 is off."""

    def within(self, room: int) -> SearchDefaults:
        """The same options for captions of at most `room` tokens."""
        return self.model_copy(update={"max_new_tokens": min(self.max_new_tokens, room)})


class ImageSettings(Settings):
    """How a decoded RGB photo becomes the vision tower's uint8 pixels [H, W, 3], and their normalisation.

    `shortest_edge` resizes the shorter side to `size[0]`, keeping the aspect ratio, then crops `crop` from the
    centre (CLIP); `squash` resizes to `size` = (height, width) outright. The tower sees
    `(pixels / 255 - mean) / std`, which the exported vision graph does itself.
    """

    size: Size
    resize: Literal["shortest_edge", "squash"] = "shortest_edge"
    crop: Size | None = None
    mean: tuple[_Finite, _Finite, _Finite]
    std: tuple[_Deviation, _Deviation, _Deviation]
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


class EncoderIdentity(Settings):
    """What an embedding comes from: only those of one encoder can be compared.

    `pooling` "mean" is the mean over an image's visual embeddings; "projection" is CLIP's own image or text feature
    (for an image, post-layernorm of CLS and `visual_projection`).
    """

    source: str
    """Where the encoder was loaded from; informational, `sha256` of its weight files identifies it."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    pooling: Literal["mean", "projection"]
    dim: Annotated[int, Field(gt=0)]

    def __str__(self) -> str:
        return f"{self.source} (weights {self.sha256[:12]}, {self.pooling}, {self.dim} wide)"

    def same_as(self, other: EncoderIdentity) -> bool:
        """Whether embeddings of the two can be compared."""
        return self.model_copy(update={"source": other.source}) == other


class RetrievalSettings(Settings):
    """How captions of similar images are put before a caption (SmallCap, Ramos et al. 2023, section 3.2)."""

    k: Annotated[int, Field(ge=0)] = 4
    """Captions in the prompt; 0 is none unless a caption asks for some."""
    template: str = "Similar images show\n\n{captions}.\n\nThis image shows "
    """`{captions}` stands for the retrieved captions, the most similar first."""
    separator: str = "\n\n"
    empty: str = "This image shows "
    """The prompt where nothing was retrieved."""
    max_caption_tokens: Annotated[int, Field(gt=0)] = 25
    """What is longer is cut."""
    encoder: EncoderIdentity

    @field_validator("template")
    @classmethod
    def _has_place(cls, template: str) -> str:
        if template.count("{captions}") != 1:
            raise ValueError("must hold {captions} once")
        return template
