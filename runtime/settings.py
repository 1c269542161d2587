"""Settings that the checkpoint (`itune.json`) and the bundle (`bundle.json`) share."""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

_Pixels = Annotated[int, Field(gt=0, le=8192)]
Size = tuple[_Pixels, _Pixels]
"""(height, width)."""
Method = Literal["i-tuning", "clipcap", "smallcap"]
"""How the image reaches the frozen language model."""
MOST_BEAMS = 1024
"""Maximum of `num_beams`: each beam takes a row of the decoder and its cache."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False)]


ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_accurate", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"),
    "quick_gelu": "quick_gelu",
    **dict.fromkeys(("silu", "swish"), "silu"),
    "relu": "relu",
}
"""The function that each of transformers' names stands for, of those that graphs and kernels have."""


class Settings(BaseModel):
    """Base of all models that are read from JSON: immutable; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def describe(model: type[Settings]) -> None:
    """Make the docstring under each field its description, which `--help` shows.

    Pydantic's `use_attribute_docstrings` would read the source of every model at import: 15 ms in `itune-run`.
    """
    for owner in reversed(model.__mro__[: model.__mro__.index(Settings)]):
        try:
            definition: Any = ast.parse(inspect.getsource(owner)).body[0]
        except OSError:  # a frozen application has no source
            continue
        for pair in pairwise(definition.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    if field := model.model_fields.get(name):
                        field.description = inspect.cleandoc(text)


class SearchDefaults(Settings):
    """The search options that a checkpoint and a bundle store, as in `transformers.generate`."""

    num_beams: Annotated[int, Field(ge=1, le=MOST_BEAMS)] = 5
    """Beams; 1 is greedy search."""
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 32
    """Maximum length of a caption in tokens, the end token included."""
    min_new_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Minimum length of a caption in tokens."""
    length_penalty: Finite = 1.0
    """Exponent of the length that divides the score: above 0 favours longer captions, below 0 shorter ones."""
    early_stopping: bool | Literal["never"] = False
    """True: stop once `num_beams` captions are finished. False: stop once no running beam scores better at its present
    length. "never": stop once none can score better at any length."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """No n-gram of this size occurs twice; 0 is off."""
    repetition_penalty: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Above 1, tokens of the caption so far become less likely; 1 is off."""

    def within(self, room: int) -> SearchDefaults:
        """The same options for captions of at most `room` tokens."""
        return self.model_copy(update={"max_new_tokens": min(self.max_new_tokens, room)})


class ImageSettings(Settings):
    """How a decoded RGB photo becomes the vision tower's uint8 pixels [H, W, 3], and how those are normalised.

    `shortest_edge` resizes the shorter side to `size[0]`, keeping the aspect ratio, then crops `crop` from the
    centre (CLIP); `squash` resizes to `size` = (height, width), whatever the aspect ratio. The tower sees
    `(pixels / 255 - mean) / std`, which the exported vision graph computes itself.
    """

    size: Size
    resize: Literal["shortest_edge", "squash"] = "shortest_edge"
    crop: Size | None = None
    mean: tuple[Finite, Finite, Finite]
    std: tuple[_Deviation, _Deviation, _Deviation]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the pixels that the tower receives."""
        return self.crop or self.size


class TextSettings(Settings):
    """How captions are written: `begin` [prompt] caption `end`; `begin` and `end` are single tokens."""

    prompt: str = ""
    begin: str | None = "<|endoftext|>"
    """None: no token comes between the image's embeddings and the prompt."""
    end: str = "<|endoftext|>"
    lower: bool = False
    strip_period: bool = False


class EncoderIdentity(Settings):
    """Identifies the encoder of an embedding: only embeddings of the same encoder can be compared.

    `pooling` "mean" is the mean over an image's visual embeddings; "projection" is CLIP's own image or text feature
    (for an image, post-layernorm of CLS, then `visual_projection`).
    """

    source: str
    """Where the encoder was loaded from; for information only: `sha256` of its weight files identifies it."""
    sha256: Sha256
    pooling: Literal["mean", "projection"]
    dim: Annotated[int, Field(gt=0)]

    def __str__(self) -> str:
        return f"{self.source} (weights {self.sha256[:12]}, {self.pooling}, {self.dim} wide)"

    def same_as(self, other: EncoderIdentity) -> bool:
        """Whether embeddings of the two can be compared."""
        return self.model_copy(update={"source": other.source}) == other


class RetrievalSettings(Settings):
    """How captions of similar images become the prompt (SmallCap, Ramos et al. 2023, section 3.2)."""

    k: Annotated[int, Field(ge=0)] = 4
    """Number of captions in the prompt; 0: none by default."""
    template: str = "Similar images show\n\n{captions}.\n\nThis image shows "
    """The prompt; `{captions}` is replaced by the retrieved captions, the most similar first."""
    separator: str = "\n\n"
    empty: str = "This image shows "
    """The prompt when no caption was retrieved."""
    max_caption_tokens: Annotated[int, Field(gt=0)] = 25
    """Longer captions are cut."""
    encoder: EncoderIdentity

    @field_validator("template")
    @classmethod
    def _has_place(cls, template: str) -> str:
        if template.count("{captions}") != 1:
            raise ValueError("must contain {captions} exactly once")
        return template
