"""Load a checkpoint with its frozen parts, and make a captioner of it."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from .backbones import LanguageModel, VisionTower, load_language_model, load_vision_tower
from .checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointConfig,
    CheckpointError,
    find_checkpoint,
    load_config,
    resolve_source,
)
from .eager import EagerEngine
from .methods.base import CaptionModel
from .methods.registry import MODELS
from .retrieval.encoder import RetrievalHead, load_head
from .runtime import Captioner
from .runtime.bundle import TokenSettings
from .runtime.engines.base import Int64
from .runtime.retrieval.retriever import Retriever
from .runtime.settings import RetrievalSettings
from .training.batches import encode_text, special_token


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


def load_captioner(
    folder: Path,
    *,
    engine: str = "auto",
    threads: int | None = None,
    datastore: Path | None = None,
    retrieve: int | None = None,
) -> Captioner:
    """The captioner of an adapter checkpoint (eager PyTorch) or of a bundle (`engine`, as in `Captioner.load`).

    `datastore` and `retrieve` as in `Captioner.load`; of a checkpoint that was trained without retrieval, too.
    """
    checkpoint = find_checkpoint(folder)
    if not (checkpoint / CONFIG_FILE).is_file():
        return Captioner.load(folder, engine=engine, threads=threads, datastore=datastore, retrieve=retrieve)
    loaded = LoadedCheckpoint.load(checkpoint)
    trained = loaded.config.retrieval
    if datastore is not None or retrieve or trained is not None:
        pooling = None if trained is None else trained.encoder.pooling
        head = load_head(loaded.tower, loaded.config.vision.source, pooling)
        captioner = eager_captioner(loaded, head=head)
        captioner.retriever = Retriever.load(
            trained or RetrievalSettings(k=0, encoder=head.encoder),
            loaded.config.text,
            loaded.language.tokenizer,
            model=folder,
            datastore=datastore,
            k=retrieve,
        )
        return captioner
    return eager_captioner(loaded)


def eager_captioner(
    loaded: LoadedCheckpoint, vocabulary: Int64 | None = None, head: RetrievalHead | None = None
) -> Captioner:
    """The captioner that runs a checkpoint in eager PyTorch; `vocabulary` and `head` as in `EagerEngine`."""
    text, tokenizer, gpt2 = loaded.config.text, loaded.language.tokenizer, loaded.language.model.config
    try:
        tokens = TokenSettings(
            begin=None if text.begin is None else special_token(tokenizer, text.begin, "begin"),
            end=special_token(tokenizer, text.end, "end"),
            prompt=encode_text(tokenizer, text.prompt),
            prefix=loaded.model.prefix_length,
            vocab_size=gpt2.vocab_size,
            shortlist=None if vocabulary is None else len(vocabulary),
            max_positions=gpt2.n_positions,
        )
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"the checkpoint does not fit its language model: {reason}") from None
    engine = EagerEngine(loaded.model, loaded.tower, vocabulary, head)
    return Captioner(engine, tokenizer, loaded.config.image, tokens, loaded.config.search.within(tokens.room))
