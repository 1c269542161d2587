"""Caption a split and score it against its references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .data.features import Features
from .data.records import Record
from .eager import EagerEngine
from .files import write_json
from .metrics import evaluate
from .progress import OnProgress, silent
from .runtime import Captioner
from .runtime.errors import ImageError
from .runtime.search import SearchConfig
from .runtime.search.loop import search
from .runtime.settings import TextSettings
from .training.batches import prompt_tokens, special_token

_BATCH = 16  # images per search


def caption_features(
    engine: EagerEngine,
    features: Features,
    images: Sequence[Path],
    tokenizer: Tokenizer,
    text: TextSettings,
    config: SearchConfig,
    *,
    prompts: Mapping[Path, Sequence[int]] | None = None,
    progress: OnProgress = silent,
) -> list[str]:
    """Caption photos from their visual embeddings, as training does.

    `prompts` maps each photo to its prompt tokens; by default all photos share those of `text`.
    """
    shared = prompt_tokens(tokenizer, text, engine.model.prefix_ids)
    end = special_token(tokenizer, text.end, "end")
    captions: list[str] = []
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        state = engine.encode_features(features.read(batch))
        tokens = [shared if prompts is None else prompts[image] for image in batch]
        for hypotheses in search(engine, state, tokens, config, end):
            captions.append(tokenizer.decode(list(hypotheses[0].tokens), skip_special_tokens=True).strip())
        progress(len(captions), len(images))
    return captions


def caption_records(
    captioner: Captioner,
    records: Sequence[Record],
    *,
    progress: OnProgress = silent,
    **search_options: Any,
) -> tuple[dict[str, str], dict[Path, str]]:
    """Return captions by record id, and the photos that could not be captioned with the reasons.

    `search_options` are those of `Captioner.stream`.
    """
    captions: dict[str, str] = {}
    failed: dict[Path, str] = {}
    stream = captioner.stream([record.image for record in records], **search_options)
    for done, (record, (_, result)) in enumerate(zip(records, stream, strict=True), 1):
        if isinstance(result, ImageError):
            failed[record.image] = str(result)
        else:
            captions[record.id] = result.caption
        progress(done, len(records))
    return captions, failed


def score_captions(captions: dict[str, str], records: Sequence[Record]) -> dict[str, float]:
    """Score captions, by record id, against the records' own captions: every score of `metrics` that needs no Java."""
    return evaluate(captions, {record.id: record.references for record in records}, java=False).scores()


def write_results(captions: dict[str, str], path: Path) -> None:
    """Write captions in COCO's results format, `[{"image_id", "caption"}]`; numeric ids become numbers."""
    results = [
        {"image_id": int(key) if key.isdecimal() and str(int(key)) == key else key, "caption": caption}
        for key, caption in captions.items()
    ]
    write_json(path, results, indent=1)
