"""The data of a training run, and the retrieved captions in its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backbones import LanguageModel, VisionTower
from ..data.features import Features
from ..data.records import Record
from ..progress import OnProgress, silent
from ..retrieval.encoder import OwnCaptions, load_head, retrieve_for
from ..runtime.retrieval.datastore import Datastore
from ..runtime.retrieval.prompts import PromptWriter
from ..runtime.settings import RetrievalSettings, TextSettings
from ..runtime.text import encode_caption
from .batches import prompt_tokens
from .config import TrainConfig


@dataclass(frozen=True)
class Prompting:
    """The prompts of retrieved captions, prepared once for all epochs."""

    settings: RetrievalSettings
    prompts: dict[Path, tuple[int, ...]]  # by photo, the tokens before each of its captions: begin, then the prompt
    captions: float  # retrieved captions per prompt on average: fewer than k if some had no room
    datastore: dict[str, Any]  # the origin of the captions, for `itune.json`


@dataclass(frozen=True)
class TrainingData:
    """The data sets of a training run, by name; `features` are prepared for the photos of all."""

    train: Mapping[str, Sequence[Record]]
    dev: Mapping[str, Sequence[Record]]
    features: Features
    prompting: Prompting | None = None  # None: every caption has the same prompt


def prepare_prompts(
    config: TrainConfig,
    text: TextSettings,
    language: LanguageModel,
    tower: VisionTower,
    data: TrainingData,
    *,
    base: RetrievalSettings | None = None,
    cache: Path | None = None,
    progress: OnProgress = silent,
) -> Prompting:
    """Retrieve captions from the datastore of `config` for every photo.

    A photo never retrieves its own captions (SmallCap, section 3.3), not even a dev photo: the datastore may have both
    splits. `base`: the retrieval settings of the checkpoint that the training starts from. `cache`: a folder that
    keeps the retrieved captions.

    Raises:
        DatastoreError: the datastore cannot be read, or was built with another encoder than `tower`.
        SearchError: the language model has too few positions for a prompt.
    """
    assert config.datastore is not None
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
    retrieved = 0
    # Each set on its own, since another may have the same ids.
    sets: list[tuple[Sequence[Record], OwnCaptions]] = [(records, "captions") for records in data.train.values()]
    sets += [(records, "photo") for records in data.dev.values()]
    for records, own in sets:
        found = retrieve_for(
            records, data.features, store, settings.k, head, leave_out=own, cache=cache, progress=progress
        )
        for record in records:
            captions = record.captions if own == "captions" else ()  # dev captions are not tokenized
            lengths = [len(encode_caption(language.tokenizer, text, caption)) + 1 for caption in captions]
            longest = max(config.max_new_tokens, min(max(lengths, default=0), config.max_caption_tokens + 1))
            # The last token of a caption needs no position: the language model does not read it.
            ids, written = writer.write(found[record.id], positions - longest + 1 - len(begin))
            prompts.setdefault(record.image, (*begin, *ids))  # in several sets, a photo keeps its first prompt
            retrieved += len(written)
    manifest = store.manifest
    origin = {"kind": manifest.kind, "entries": manifest.entries, "captions": manifest.captions}
    return Prompting(settings, prompts, retrieved / len(prompts), origin | manifest.provenance)
