"""The data of a training run, and the retrieved captions in its prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backbones import LanguageModel, VisionTower
from ..data.features import Features
from ..data.records import Record
from ..retrieval.encoder import load_head, retrieve_for
from ..runtime.retrieval.datastore import Datastore
from ..runtime.retrieval.prompts import PromptWriter
from ..runtime.settings import RetrievalSettings, TextSettings
from .batches import encode_caption, prompt_tokens
from .config import TrainConfig


@dataclass(frozen=True)
class Prompting:
    """The prompts of retrieved captions, prepared once for all epochs."""

    settings: RetrievalSettings
    prompts: dict[Path, tuple[int, ...]]
    """By photo: the token ids before each of its captions: begin, then the prompt."""
    captions: float
    """Retrieved captions per prompt on average: fewer than k if the language model has too few positions."""
    datastore: dict[str, Any]
    """The origin of the captions, for `itune.json`."""


@dataclass(frozen=True)
class TrainingData:
    """The splits of a training run; `features` are prepared for the photos of both."""

    train: Sequence[Record]
    dev: Sequence[Record]
    features: Features
    prompting: Prompting | None = None
    """None: every caption has the same prompt."""


def prepare_prompts(
    config: TrainConfig,
    text: TextSettings,
    language: LanguageModel,
    tower: VisionTower,
    data: TrainingData,
    *,
    base: RetrievalSettings | None = None,
    cache: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> Prompting | None:
    """Retrieve captions for every photo of both splits; None if the configuration names no datastore.

    A photo never retrieves its own captions (SmallCap, section 3.3), not even a dev photo: a datastore may hold both
    splits. `base` are the retrieval settings of the checkpoint that the training starts from. The folder `cache` keeps
    the retrieved captions. `progress` receives what is being done, the photos done and all photos.

    Raises:
        DatastoreError: the datastore cannot be read, or another encoder than `tower` built it.
        SearchError: the language model has no positions left for a prompt.
    """
    if config.datastore is None:
        return None
    store = Datastore.load(config.datastore)
    head = load_head(tower, config.vision, store.manifest.encoder.pooling)
    store.require(head.encoder)
    settings = (base or RetrievalSettings(encoder=head.encoder)).model_copy(
        update={"k": config.retrieved, "encoder": head.encoder}
    )
    writer = PromptWriter(language.tokenizer, text, settings)
    begin = prompt_tokens(language.tokenizer, text.model_copy(update={"prompt": ""}))
    positions: int = language.model.config.n_positions
    prompts: dict[Path, tuple[int, ...]] = {}
    captions = 0
    for what, records in (("train", data.train), ("dev", data.dev)):
        found = retrieve_for(
            records,
            data.features,
            store,
            settings.k,
            head,
            leave_out="captions" if what == "train" else "photo",
            cache=cache,
            progress=lambda done, total, what=what: progress(f"retrieving for {what} photos", done, total),  # type: ignore[misc]
        )
        for record in records:
            longest = _longest_caption(config, text, language, record.captions if what == "train" else ())
            # The last token of a caption needs no position: the language model does not read it.
            ids, written = writer.write(found[record.id], positions - longest + 1 - len(begin))
            prompts.setdefault(record.image, (*begin, *ids))  # a photo in both splits keeps its training prompt
            captions += len(written)
    manifest = store.manifest
    origin = {"kind": manifest.kind, "entries": manifest.entries, "captions": manifest.captions}
    return Prompting(settings, prompts, captions / len(prompts), origin | manifest.provenance)


def _longest_caption(config: TrainConfig, text: TextSettings, language: LanguageModel, captions: Sequence[str]) -> int:
    """Tokens of the longest of these captions, or of the captions to be written if that is more; with the end token."""
    longest = config.max_new_tokens
    for caption in captions:
        length = len(encode_caption(language.tokenizer, text, caption)) + 1
        longest = max(longest, min(length, config.max_caption_tokens + 1))
    return longest
