"""The captioning methods by their names in `itune.json`, and checkpoints of any of them."""

from __future__ import annotations

from pathlib import Path

from ..backbones import LanguageModel, VisionTower, load_language_model, load_vision_tower
from ..checkpoint import WEIGHTS_FILE, CheckpointConfig, CheckpointError, find_checkpoint, load_config, resolve_source
from ..runtime.settings import Method
from .base import CaptionModel
from .clipcap import ClipCapModel
from .ituning import ITuningModel
from .smallcap import SmallCapModel

MODELS: dict[Method, type[CaptionModel]] = {
    model.method: model for model in (ITuningModel, ClipCapModel, SmallCapModel)
}


def check_hashes(
    folder: Path, config: CheckpointConfig, language: LanguageModel | None, tower: VisionTower | None
) -> None:
    """Raise CheckpointError where a frozen part is not the one that a checkpoint names; None is not looked at."""
    for what, recorded, found in (
        ("language model", config.language_model, language),
        ("vision tower", config.vision, tower),
    ):
        if found is not None and recorded.sha256 not in (None, found.sha256):
            raise CheckpointError(
                f"{folder}: the {what} at {recorded.source} is not the one that the adapters were trained with (its "
                f"weights hash to {found.sha256[:12]}, itune.json says {str(recorded.sha256)[:12]})"
            )


class LoadedCheckpoint:
    """A checkpoint with its frozen parts: `config`, `model`, `language` (tokenizer included) and `tower`."""

    def __init__(
        self, config: CheckpointConfig, model: CaptionModel, language: LanguageModel, tower: VisionTower
    ) -> None:
        self.config, self.model, self.language, self.tower = config, model, language, tower

    @classmethod
    def load(cls, folder: Path) -> LoadedCheckpoint:
        """Load a checkpoint folder, its language model and tower; hashes are held to `itune.json`."""
        folder = find_checkpoint(folder)
        config = load_config(folder)
        lm, vision = config.language_model, config.vision
        language = load_language_model(resolve_source(lm.source, folder), lm.revision)
        tower = load_vision_tower(resolve_source(vision.source, folder), vision.revision, image=config.image)
        check_hashes(folder, config, language, tower)
        if (tower.tokens, tower.width) != (vision.tokens, vision.width):
            raise CheckpointError(
                f"{folder}: the vision tower gives {tower.tokens} x {tower.width} embeddings, "
                f"itune.json says {vision.tokens} x {vision.width}"
            )
        model = MODELS[config.method].from_checkpoint(config, language.model)
        model.load_adapters(folder / WEIGHTS_FILE)
        return cls(config, model, language, tower)
