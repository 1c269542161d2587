"""The captions that both sides write for the same photos: how many are equal, and CIDEr-D on a dev split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ...data.records import Record
from ...metrics import evaluate
from ...runtime.caption import Caption
from ...runtime.captioner import Captioner
from ...runtime.errors import ImageError, ItuneError
from ...runtime.settings import SearchDefaults, Settings
from .limits import Limits
from .report import Check

DEV_PHOTOS = 200
"""Default number of photos of a dev split to caption."""
_DEV = "dev.json"
_TIE = 1e-4
"""Captions whose scores differ by less are equally good: rounding decides which one the search returns."""


class Written(Settings):
    """The parts of a caption that are compared."""

    caption: str
    tokens: list[int]
    score: float

    @classmethod
    def of(cls, caption: Caption) -> Self:
        """The parts of a captioner's result."""
        return cls(caption=caption.caption, tokens=list(caption.tokens), score=caption.score)

    def as_good_as(self, other: Written) -> bool:
        """Whether the tokens are equal or the scores tie."""
        return self.tokens == other.tokens or abs(self.score - other.score) < _TIE


class _DevSplit(Settings):
    search: SearchDefaults
    photos: dict[str, Path]
    captions: dict[str, tuple[str, ...]]


def caption_photos(
    captioner: Captioner,
    photos: Mapping[str, Path],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    **options: Any,
) -> dict[str, Written]:
    """Caption photos by id, without those that cannot be read; raises ItuneError if none can.

    `options` are those of `Captioner.stream`.
    """
    written = {}
    stream = captioner.stream(list(photos.values()), **options)
    for done, (key, (_, result)) in enumerate(zip(photos, stream, strict=True), 1):
        if not isinstance(result, ImageError):
            written[key] = Written.of(result)
        progress(done, len(photos))
    if not written:
        raise ItuneError(f"none of {len(photos)} photos can be read; the first is {next(iter(photos.values()))}")
    return written


def write_dev_split(records: Sequence[Record], search: SearchDefaults, folder: Path) -> None:
    """Write the photos, their captions and the search options to the folder that both sides share."""
    photos = {record.id: record.image.absolute() for record in records}
    dev = _DevSplit(search=search, photos=photos, captions={record.id: tuple(record.captions) for record in records})
    (folder / _DEV).write_text(dev.model_dump_json(), encoding="utf-8")


def caption_dev_split(captioner: Captioner, folder: Path) -> dict[str, Written]:
    """Caption the dev split in `folder`; empty if there is none."""
    if not (folder / _DEV).exists():
        return {}
    dev = _DevSplit.model_validate_json((folder / _DEV).read_bytes())
    return caption_photos(captioner, dev.photos, **dev.search.model_dump())


def compare_dev_split(
    reference: dict[str, Written], found: dict[str, Written], folder: Path, limits: Limits
) -> list[Check]:
    """Check how many captions are the same and how much of the reference's CIDEr-D is left."""
    captions = _DevSplit.model_validate_json((folder / _DEV).read_bytes()).captions
    both = [key for key in reference if key in found]
    unreadable = f", {len(captions) - len(both)} cannot be read" if len(both) < len(captions) else ""
    sides = [{key: written[key].caption for key in both} for written in (reference, found)]
    evaluations = [evaluate(side, captions, java=False) for side in sides]
    losses = np.subtract(*(evaluation.per_image()["cider"] for evaluation in evaluations))
    before, after = (evaluation.scores()["cider"] for evaluation in evaluations)
    forgiven = 2 * float(losses.std()) / len(losses) ** 0.5
    same = float(np.mean([reference[key].as_good_as(found[key]) for key in both]))
    case = f"{len(set(sides[0].values()))} different, {len(both)} photos{unreadable}"
    points = f"{100 * after:.1f}, PyTorch {100 * before:.1f}"
    kept = after / before if before else 1.0
    enough = after + forgiven >= limits.cider * before
    return [
        Check("captions, dev", case, None, same, limits.dev_captions, same >= limits.dev_captions),
        Check("CIDEr-D, dev", points, None, kept, limits.cider, enough),
    ]
