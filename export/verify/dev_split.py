"""A dev split captioned by both sides: identical captions and CIDEr-D."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...data.records import Record
from ...metrics import score
from ...runtime.captioner import Captioner
from ...runtime.errors import ImageError, ItuneError
from ...runtime.settings import SearchDefaults, Settings
from .limits import Limits
from .report import Check
from .scenarios import Written

DEV_PHOTOS = 200
"""How many photos of a dev split are captioned by default."""
_FILE = "dev.json"


class _DevSplit(Settings):
    search: SearchDefaults
    photos: dict[str, Path]
    captions: dict[str, tuple[str, ...]]


def write_dev_split(records: Sequence[Record], search: SearchDefaults, folder: Path) -> None:
    """Write the photos, their captions and the search options to the folder that both sides share."""
    photos = {record.id: record.image.absolute() for record in records}
    dev = _DevSplit(search=search, photos=photos, captions={record.id: tuple(record.captions) for record in records})
    (folder / _FILE).write_text(dev.model_dump_json(), encoding="utf-8")


def caption_dev_split(captioner: Captioner, folder: Path) -> dict[str, Written]:
    """Caption the dev split in `folder`, if there is one; returns captions by record id, without unreadable photos.

    Raises:
        ItuneError: no photo can be read.
    """
    if not (folder / _FILE).exists():
        return {}
    dev = _read(folder)
    images = list(dev.photos.values())
    stream = captioner.stream(images, **dev.search.model_dump())
    written = {
        key: Written.of(result)
        for key, (_, result) in zip(dev.photos, stream, strict=True)
        if not isinstance(result, ImageError)
    }
    if not written:
        raise ItuneError(f"--dev-data: none of {len(images)} photos can be read, the first is {images[0]}")
    return written


def compare_dev_split(
    reference: dict[str, Written], found: dict[str, Written], folder: Path, limits: Limits
) -> list[Check]:
    """Check how many captions are the same and how much of the reference's CIDEr-D is left."""
    captions = _read(folder).captions
    sides = [{key: own.caption for key, own in written.items()} for written in (reference, found)]
    before, after = (score(side, {key: captions[key] for key in side}) for side in sides)
    losses = np.array([before.per_image_cider[key] - after.per_image_cider[key] for key in reference])
    forgiven = 2 * float(losses.std()) / len(losses) ** 0.5
    same = float(np.mean([own.as_good_as(found[key]) for key, own in reference.items()]))
    case = f"{len(set(sides[0].values()))} different, {len(reference)} photos"
    points = f"{100 * after.cider:.1f}, PyTorch {100 * before.cider:.1f}"
    kept = after.cider / before.cider if before.cider else 1.0
    enough = after.cider + forgiven >= limits.cider * before.cider
    return [
        Check("captions, dev", case, None, same, limits.dev_captions, same >= limits.dev_captions),
        Check("CIDEr-D, dev", points, None, kept, limits.cider, enough),
    ]


def _read(folder: Path) -> _DevSplit:
    return _DevSplit.model_validate_json((folder / _FILE).read_bytes())
