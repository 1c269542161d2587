"""Load a checkpoint with its frozen parts, and turn it into a captioner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .backbones import LanguageModel, VisionTower, load_language_model, load_vision_tower
from .checkpoint import CONFIG_FILE, WEIGHTS_FILE, CheckpointConfig, CheckpointError, find_checkpoint, resolve_source
from .eager import EagerEngine
from .methods.base import CaptionModel
from .methods.registry import MODELS
from .methods.schemas import load_config
from .retrieval.encoder import RetrievalHead, load_head
from .runtime import Captioner
from .runtime.bundle import TokenSettings
from .runtime.engines.base import Int64
from .runtime.errors import reading
from .runtime.retrieval.prompts import Retriever
from .runtime.settings import RetrievalSettings
from .runtime.text import encode_text
from .training.batches import special_token


def check_hashes(
    folder: Path, config: CheckpointConfig, language: LanguageModel | None, tower: VisionTower | None
) -> None:
    """Refuse a language model or tower that the adapters were not trained with; None is not checked."""
    parts = (("language_model", language, ("sha256",)), ("vision", tower, ("sha256", "tokens", "width")))
    for part, model, fields in parts:
        if model is None:
            continue
        source = getattr(config, part)
        trained = {field: getattr(source, field) for field in fields} | source.settings
        found = {field: getattr(model, field) for field in fields} | model.settings
        for field, value in trained.items():
            if value is not None and value != found.get(field, value):
                raise CheckpointError(
                    f"{folder / CONFIG_FILE}: {part}.{field} is {value}, but that of {source.source} is "
                    f"{found[field]}: put back the model that the adapters were trained with"
                )


@dataclass
class LoadedCheckpoint:
    """A checkpoint with its frozen parts; `language` has the tokenizer."""

    config: CheckpointConfig
    model: CaptionModel
    language: LanguageModel
    tower: VisionTower

    @classmethod
    def load(cls, folder: Path) -> LoadedCheckpoint:
        """Load a checkpoint folder, its language model and its tower, and compare their hashes with `itune.json`."""
        folder = find_checkpoint(folder)
        config = load_config(folder)
        lm, vision = config.language_model, config.vision
        language = load_language_model(resolve_source(lm.source, folder), lm.revision)
        tower = load_vision_tower(resolve_source(vision.source, folder), vision.revision, image=config.image)
        check_hashes(folder, config, language, tower)
        # Only the weights file takes memory, whatever sizes itune.json names.
        with torch.device("meta"), reading(folder / CONFIG_FILE, CheckpointError, "copy the checkpoint again"):
            model = MODELS[config.method].create(config, language.model, (tower.tokens, tower.width))
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
    """The captioner of an adapter checkpoint (eager PyTorch) or of a bundle, with the options of `Captioner.load`.

    `engine` and `threads` apply to bundles only. A checkpoint that was trained without retrieval may use a `datastore`.
    """
    checkpoint = find_checkpoint(folder)
    if not (checkpoint / CONFIG_FILE).is_file():
        return Captioner.load(folder, engine=engine, threads=threads, datastore=datastore, retrieve=retrieve)
    loaded = LoadedCheckpoint.load(checkpoint)
    trained = loaded.config.retrieval
    if datastore is None and not retrieve and trained is None:
        return eager_captioner(loaded)
    head = load_head(loaded.tower, loaded.config.vision.source, None if trained is None else trained.encoder.pooling)
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


def eager_captioner(
    loaded: LoadedCheckpoint, vocabulary: Int64 | None = None, head: RetrievalHead | None = None
) -> Captioner:
    """The captioner that runs a checkpoint in eager PyTorch; `vocabulary` and `head` as in `EagerEngine`."""
    text, tokenizer, gpt2 = loaded.config.text, loaded.language.tokenizer, loaded.language.model.config
    with reading(loaded.language.folder, CheckpointError, "the checkpoint's text settings do not fit this model"):
        tokens = TokenSettings(
            begin=None if text.begin is None else special_token(tokenizer, text.begin, "begin"),
            end=special_token(tokenizer, text.end, "end"),
            prompt=encode_text(tokenizer, text.prompt),
            prefix=loaded.model.prefix_length,
            vocab_size=gpt2.vocab_size,
            shortlist=None if vocabulary is None else len(vocabulary),
            max_positions=gpt2.n_positions,
        )
    engine = EagerEngine(loaded.model, loaded.tower, vocabulary, head)
    return Captioner(engine, tokenizer, loaded.config.image, tokens, loaded.config.search.within(tokens.room))
