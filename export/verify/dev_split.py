"""What a bundle's graphs write about the photos of a dev split, beside PyTorch: equal captions, and CIDEr-D."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data.records import Record
from ...metrics import score
from ...runtime.captioner import Captioner
from ...runtime.errors import ImageError, ItuneError
from ...runtime.settings import SearchDefaults

DEV_PHOTOS = 200
"""Of a dev split, unless more are asked for."""
_FILE = "dev.json"
Written = dict[str, dict[str, Any]]
"""By a record's id, of the photos that can be read: "caption", "tokens", and "score"."""


@dataclass(frozen=True)
class DevScores:
    """How two sides caption the same photos."""

    photos: int
    different: int
    """How many captions the reference has among them."""
    same: float
    """Fraction of the photos with the same caption, or one that the search holds for equally good."""
    reference: float
    """CIDEr-D in the COCO code's scale, as `found`."""
    found: float
    margin: float
    """Two standard errors of the difference between the two: what chance may make of it."""

    @property
    def kept(self) -> float:
        """What is left of the reference's CIDEr-D; 1 where there is nothing to lose."""
        return self.found / self.reference if self.reference else 1.0


def write_dev_split(records: Sequence[Record], search: SearchDefaults, folder: Path) -> None:
    """Leave the photos and how to caption them for the processes of the verification."""
    photos = [{"id": record.id, "image": str(record.image.absolute())} for record in records]
    captions = {record.id: record.captions for record in records}
    content = {"search": search.model_dump(), "photos": photos, "captions": captions}
    (folder / _FILE).write_text(json.dumps(content), encoding="utf-8")


def caption_dev_split(captioner: Captioner, folder: Path) -> Written:
    """Caption what `write_dev_split` left in `folder`; nothing if it left nothing.

    Raises:
        ItuneError: no photo can be read.
    """
    if not (folder / _FILE).exists():
        return {}
    content = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    images = [Path(photo["image"]) for photo in content["photos"]]
    written = {}
    for photo, (_, result) in zip(content["photos"], captioner.stream(images, **content["search"]), strict=True):
        if not isinstance(result, ImageError):
            written[photo["id"]] = {"caption": result.caption, "tokens": list(result.tokens), "score": result.score}
    if not written:
        raise ItuneError(f"--dev-data: {images[0]} cannot be read, nor can any other of {len(images)} photos")
    return written


def compare_dev_split(reference: Written, found: Written, folder: Path, tie: float) -> DevScores:
    """Score both sides against the split's own captions; captions of scores within `tie` are equally good.."""
    captions = json.loads((folder / _FILE).read_text(encoding="utf-8"))["captions"]
    sides = [{key: own["caption"] for key, own in written.items()} for written in (reference, found)]
    before, after = (score(side, {key: captions[key] for key in side}) for side in sides)
    losses = np.array([before.per_image_cider[key] - after.per_image_cider[key] for key in reference])
    return DevScores(
        photos=len(reference),
        different=len(set(sides[0].values())),
        same=float(np.mean([_equal(own, found[key], tie) for key, own in reference.items()])),
        reference=before.cider,
        found=after.cider,
        margin=2 * float(losses.std()) / len(losses) ** 0.5,
    )


def _equal(one: dict[str, Any], other: dict[str, Any], tie: float) -> bool:
    return bool(one["tokens"] == other["tokens"] or abs(one["score"] - other["score"]) < tie)
