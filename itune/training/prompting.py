"""Retrieved captions in the prompts of a training: which photo's captions are preceded by what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backbones import LanguageModel, VisionTower
from ..data.features import Features
from ..data.records import Record
from ..retrieval.encoder import Own, load_head, retrieve_for
from ..runtime.errors import ItuneError
from ..runtime.retrieval.datastore import Datastore
from ..runtime.retrieval.prompts import PromptWriter
from ..runtime.settings import RetrievalSettings, TextSettings
from .batches import caption_head, encode_caption
from .config import TrainConfig

Progress = Callable[[str, int, int], None]
"""Told (what, done, in all)."""


@dataclass(frozen=True)
class Prompting:
    """What a training retrieved, once for all its epochs."""

    settings: RetrievalSettings
    heads: dict[Path, tuple[int, ...]]
    """By photo: the token ids that stand before each of its captions: begin, then the prompt."""
    captions: float
    """How many retrieved captions a prompt holds on average: fewer than k where the positions are too few."""
    datastore: dict[str, Any]
    """Where the captions come from, for `itune.json`."""


def prepare_prompts(
    config: TrainConfig,
    text: TextSettings,
    language: LanguageModel,
    tower: VisionTower,
    features: Features,
    train: Sequence[Record],
    dev: Sequence[Record],
    *,
    base: RetrievalSettings | None = None,
    cache: Path | None = None,
    progress: Progress = lambda _what, _done, _total: None,
) -> Prompting | None:
    """Retrieve for every photo of the training and dev splits, as `config` says; None where it retrieves nothing.

    Photos' own captions are left out (SmallCap, section 3.3), of dev photos, too: a datastore may hold both splits.
    `features` have been prepared with all photos; `base` are the settings of the checkpoint that a training starts
    from; `cache` is a folder that keeps what was retrieved.

    Raises:
        DatastoreError: the datastore cannot be read, or is of another encoder than `tower`.
        ItuneError: the language model has no positions for a prompt.
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
    begin = caption_head(language.tokenizer, text.model_copy(update={"prompt": ""}))
    heads: dict[Path, tuple[int, ...]] = {}
    captions = 0
    for what, records in (("train", train), ("dev", dev)):
        found = retrieve_for(
            records,
            features,
            store,
            settings.k,
            head,
            leave_out=Own.CAPTIONS if what == "train" else Own.PHOTO,
            cache=cache,
            progress=lambda done, total, what=what: progress(f"retrieving for {what} photos", done, total),  # type: ignore[misc]
        )
        for record in records:
            room = _room(config, text, language, record if what == "train" else None)
            ids, written = writer.write(found[record.id], room + 1 - len(begin))
            heads.setdefault(record.image, (*begin, *ids))  # of a photo in both splits, that without its captions
            captions += len(written)
    manifest = store.manifest
    origin = {"kind": manifest.kind, "entries": manifest.entries, "captions": manifest.captions}
    return Prompting(settings, heads, captions / len(heads), origin | manifest.provenance)


def _room(config: TrainConfig, text: TextSettings, language: LanguageModel, record: Record | None) -> int:
    """How many positions the captions of a training photo, and such as the captioner may write, leave."""
    longest = config.max_new_tokens
    for caption in () if record is None else record.captions:
        length = len(encode_caption(language.tokenizer, text, caption)) + 1  # the end token
        longest = max(longest, min(length, config.max_caption_tokens + 1))
    room: int = language.model.config.n_positions - longest
    if room < 1:
        raise ItuneError(
            f"{config.language_model} has {language.model.config.n_positions} positions, and captions take {longest}: "
            "lower --max-caption-tokens or --max-new-tokens"
        )
    return room
