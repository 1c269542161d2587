"""The adapter checkpoint: a folder with `adapters.safetensors` and `itune.json` (docs/design.md).

A checkpoint does not copy its frozen language model and vision tower. It refers to them by hub id or by a path relative
to the folder, and keeps the hash of their weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from .files import write_json
from .runtime.errors import ItuneError
from .runtime.recovery import recover_folder
from .runtime.settings import ImageSettings, Method, RetrievalSettings, SearchDefaults, Settings, TextSettings

if TYPE_CHECKING:
    from .backbones import LanguageModel, VisionTower

CONFIG_FILE = "itune.json"
WEIGHTS_FILE = "adapters.safetensors"


class CheckpointError(ItuneError):
    """A checkpoint is missing, incomplete, or does not fit its language model or tower."""


class ModelSource(Settings):
    """Where a frozen model comes from, and the hash of its weight files."""

    source: str
    revision: str | None = None
    sha256: str | None = None
    settings: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """What decides its numbers besides the weights; checkpoints of earlier versions do not record it."""

    @staticmethod
    def of_language_model(language: LanguageModel, source: str, folder: Path) -> ModelSource:
        """The reference to the language model loaded from `source`, for a checkpoint in `folder`."""
        settings = dict(language.settings)
        return ModelSource(source=relative_source(source, folder), sha256=language.sha256, settings=settings)


class VisionSource(ModelSource):
    """A vision tower, with the shape of its embeddings: `tokens` = N, `width` = d_v."""

    kind: Literal["clip", "onnx"]
    tokens: int = Field(gt=0)
    width: int = Field(gt=0)

    @staticmethod
    def of_tower(tower: VisionTower, source: str, folder: Path) -> VisionSource:
        """The reference to the tower loaded from `source`, for a checkpoint in `folder`."""
        return VisionSource(
            source=relative_source(source, folder),
            sha256=tower.sha256,
            settings=dict(tower.settings),
            kind=tower.kind,
            tokens=tower.tokens,
            width=tower.width,
        )


class CheckpointConfig(Settings):
    """The fields of `itune.json` that all methods share; each method adds its own."""

    format: Literal[1] = 1
    method: Method
    language_model: ModelSource
    vision: VisionSource
    image: ImageSettings
    text: TextSettings
    retrieval: RetrievalSettings | None = None
    """How training put retrieved captions before a caption; None if it did not."""
    search: SearchDefaults = SearchDefaults()
    """The default search options, here and in bundles: those of the training's dev evaluation."""
    training: dict[str, Any] = Field(default_factory=dict)
    license: str | None = None
    """The terms of the weights that training started from, in a sentence; None if they have none."""
    dropout: ClassVar[float] = 0.0  # a loaded model is not trained

    @model_validator(mode="before")
    @classmethod
    def _search_of_training(cls, content: Any) -> Any:
        """Checkpoints that were written without `search` have its options under `training`."""
        if not isinstance(content, dict) or "search" in content or not isinstance(content.get("training"), dict):
            return content
        training = content["training"]
        return content | {"search": {name: training[name] for name in SearchDefaults.model_fields if name in training}}


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint in a folder: the folder itself, or the best one of a training's output folder."""
    best = folder / "best"
    recover_folder(best)
    return best if not (folder / CONFIG_FILE).is_file() and (best / CONFIG_FILE).is_file() else folder


def save_config(config: CheckpointConfig, folder: Path) -> None:
    """Write `itune.json` atomically."""
    without = {"license"} if config.license is None else set()  # earlier versions do not know it
    write_json(folder / CONFIG_FILE, config.model_dump(mode="json", by_alias=True, exclude=without))


def resolve_source(source: str, folder: Path) -> str:
    """A source in the `itune.json` of `folder`: a path relative to the folder, or a hub id."""
    beside = folder / source
    return str(beside) if beside.exists() or source.startswith((".", "/")) else source


def relative_source(source: str, folder: Path) -> str:
    """The inverse of `resolve_source`: existing paths become relative to the checkpoint's folder."""
    path = Path(source)
    return os.path.relpath(path.resolve(), folder.resolve()) if path.exists() else source
