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
from .runtime.errors import ItuneError
from .runtime.settings import ImageSettings, Method, RetrievalSettings, SearchDefaults, Settings, TextSettings

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


def parse_config(content: dict[str, Any]) -> CheckpointConfig:
    """The content of an `itune.json`; raises pydantic's ValidationError."""
    from .methods.schemas import CHECKPOINTS

    method = content.get("method", "i-tuning")
    # The base class refuses an unknown method.
    schema = next((schema for name, schema in CHECKPOINTS.items() if name == method), CheckpointConfig)
    return schema.model_validate(content)


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
