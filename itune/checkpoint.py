"""The adapter checkpoint: a folder with `adapters.safetensors` and `itune.json` (DESIGN section 4).

The frozen language model and vision tower are referenced, by hub id or by a path relative to the folder, and
held to a hash; they are not copied.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from .files import atomic_path
from .runtime.bundle import SearchDefaults
from .runtime.errors import ItuneError
from .runtime.settings import ImageSettings, Method, RetrievalSettings, Settings, TextSettings

if TYPE_CHECKING:
    from .backbones import LanguageModel, VisionTower

CONFIG_FILE = "itune.json"
WEIGHTS_FILE = "adapters.safetensors"


class CheckpointError(ItuneError):
    """A checkpoint is missing, incomplete, or does not fit its language model or tower."""


class Source(Settings):
    """Where a frozen backbone comes from, and the hash of its weight files."""

    source: str
    revision: str | None = None
    sha256: str | None = None

    @staticmethod
    def of_language_model(language: LanguageModel, source: str, folder: Path) -> Source:
        """The language model that was loaded from `source`, as a checkpoint in `folder` names it."""
        return Source(source=relative_source(source, folder), sha256=language.sha256)


class VisionSource(Source):
    """The vision tower, with the shape of its embeddings: `tokens` = N, `width` = d_v."""

    kind: Literal["clip", "onnx"]
    tokens: int = Field(gt=0)
    width: int = Field(gt=0)

    @staticmethod
    def of_tower(tower: VisionTower, source: str, folder: Path) -> VisionSource:
        """The tower that was loaded from `source`, as a checkpoint in `folder` names it."""
        return VisionSource(
            source=relative_source(source, folder),
            sha256=tower.sha256,
            kind=tower.kind,
            tokens=tower.tokens,
            width=tower.width,
        )


class CheckpointConfig(Settings):
    """`itune.json`, as far as all methods have it; each adds the shape of its adapters."""

    format: Literal[1] = 1
    method: Method
    language_model: Source
    vision: VisionSource
    image: ImageSettings
    text: TextSettings
    retrieval: RetrievalSettings | None = None
    """The retrieved captions that the training put before a caption; None where there were none."""
    search: SearchDefaults = SearchDefaults()
    """How captions are searched for unless told otherwise, by a bundle, too: as in the training's dev evaluation."""
    training: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _searched_as_trained(cls, content: Any) -> Any:
        if not isinstance(content, dict) or "search" in content or not isinstance(content.get("training"), dict):
            return content
        training = content["training"]
        return content | {"search": {name: training[name] for name in SearchDefaults.model_fields if name in training}}

    @property
    def dropout(self) -> float:
        """The training's dropout on what an adapter retrieves; 0 where it is not told."""
        return float(self.training.get("dropout", 0.0))

    @model_validator(mode="after")
    def _dropout_is_a_share(self) -> Self:
        value = self.training.get("dropout", 0.0)
        if not (isinstance(value, int | float) and 0 <= value < 1):
            raise ValueError(f"training.dropout must be a number from 0 to below 1, not {value!r}")
        return self


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


class SmallCapCheckpoint(CheckpointConfig):
    """SmallCap's; its tensors are `layers.{i}.{norm,query,key,value,output}.{weight,bias}`."""

    method: Literal["smallcap"] = "smallcap"
    heads: int = Field(gt=0)
    attention_width: int = Field(gt=0)
    """Width of each head's queries, keys and values."""


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


CONFIGS: dict[Method, type[CheckpointConfig]] = {
    "i-tuning": ITuningCheckpoint,
    "clipcap": ClipCapCheckpoint,
    "smallcap": SmallCapCheckpoint,
}


def parse_config(content: dict[str, Any]) -> CheckpointConfig:
    """The content of an `itune.json`; raises pydantic's ValidationError."""
    method = content.get("method", "i-tuning")
    for name, known in CONFIGS.items():
        if method == name:
            return known.model_validate(content)
    return CheckpointConfig.model_validate(content)  # which refuses it


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint that a folder stands for: itself, or the best one of a training's output folder."""
    best = folder / "best"
    return best if not (folder / CONFIG_FILE).is_file() and (best / CONFIG_FILE).is_file() else folder


def load_config(folder: Path) -> CheckpointConfig:
    """Read and check `itune.json`."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not an adapter checkpoint: it has no {CONFIG_FILE}")
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: is not a JSON object")
        return parse_config(content)
    except ValueError as error:
        if not isinstance(error, ValidationError):
            raise CheckpointError(f"{path} is not JSON ({error}): copy the checkpoint again") from None
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise CheckpointError(f"{path}: field {field}: {first['msg']}") from None


def save_config(config: CheckpointConfig, folder: Path) -> None:
    """Write `itune.json` atomically."""
    text = json.dumps(config.model_dump(mode="json", by_alias=True), indent=2) + "\n"
    with atomic_path(folder / CONFIG_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")


def resolve_source(source: str, folder: Path) -> str:
    """A source as `itune.json` in `folder` means it: an existing path beside it, else a hub id."""
    beside = folder / source
    if beside.exists():
        return str(beside)
    if source.startswith((".", "/")):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: source {source} does not exist: put the model there, or correct the path"
        )
    return source


def relative_source(source: str, folder: Path) -> str:
    """The inverse of `resolve_source`: existing paths become relative to the checkpoint folder."""
    path = Path(source)
    return os.path.relpath(path.resolve(), folder.resolve()) if path.exists() else source
