"""Every caption file that people have -> `Record(image, captions, id)`; the format is told from the content.

Flickr8k and Flickr30k token files with their split lists; Karpathy's JSON (dataset_coco.json and its like);
JSON Lines of `{"image": ..., "captions": [...]}` with an optional "split", "id" and "domain"; annotation files of
COCO and NoCaps.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.retrieval.prompts import clean_caption
from .formats import DataError, Entry, find_caption_file, holds, read_entries, split_name

__all__ = ["DataError", "Record", "clean_caption", "load_records", "split_records"]


@dataclass(frozen=True)
class Record:
    """A photo and its captions as the file has them (stripped, no empty ones).

    `id` is the data set's own (COCO's id, Karpathy's cocoid or imgid, JSONL's "id"), else the photo's name without its
    suffix: it does not change when other photos come or go, so results of different runs can be compared by it.
    """

    image: Path
    captions: tuple[str, ...]
    id: str
    domain: str | None = None
    """Of NoCaps: in-domain, near-domain, out-domain."""


def load_records(
    source: Path,
    *,
    images: Path | None = None,
    split: str | None = "train",
    undivided: bool = False,
    check_images: bool = True,
    captioned: bool = True,
) -> list[Record]:
    """Read the photos of one split, in the file's order; None reads all of them.

    `source` is a caption file, or the folder that holds exactly one. The photos' names start from the folder `images`
    (without it, the file's own) or from a folder in it. "val" and "validation" mean "dev", Karpathy's "restval" counts
    as "train". A file that knows no splits is all "train", or with `undivided` all of whatever split is asked for.
    Photos without a caption are left out, unless `captioned` is False and none has any: a test split.

    Raises DataError, naming the file and the line or field, for anything that cannot be read or does not add up;
    with `check_images`, also when photos are missing.
    """
    file = find_caption_file(source) if holds(source.is_dir) else source
    entries = _select(read_entries(file), split, file, undivided)
    with_captions = [entry for entry in entries if entry.captions]
    entries = with_captions if captioned or with_captions else entries
    if not entries:
        raise DataError(f"{file}: no photo{f' of the split {split!r}' if split else ''} has a caption")
    return _locate(entries, file, images, check_images)


def split_records(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Hold out about `fraction` of the records: (train, dev), both in their given order and never empty.

    A record's side follows from its id and the seed, so photos that are added later move no other (except in a set so
    small that one side had to be given its only photo).
    """
    if not 0 < fraction < 1:
        raise DataError(f"A fraction of {fraction} cannot be held out: it must lie between 0 and 1, such as 0.1")
    if len(records) < 2:
        raise DataError(f"{len(records)} photo cannot be divided into train and dev: at least 2 are needed")

    def position(record: Record) -> float:
        digest = hashlib.blake2b(f"{seed}/{record.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    positions = sorted(map(position, records))
    limit = min(max(fraction, positions[0]), positions[-2])
    train = [record for record in records if position(record) > limit]
    return train, [record for record in records if position(record) <= limit]


def _select(entries: list[Entry], split: str | None, file: Path, undivided: bool) -> list[Entry]:
    if split is None:
        return entries
    wanted = split_name(split)
    sizes = Counter(entry.split for entry in entries)
    if set(sizes) == {None}:
        if wanted == "train" or undivided:
            return entries
        raise DataError(
            f'{file}: does not say which photos are its {wanted} split; give each line a "split" (or lay split lists '
            "beside a token file), take all photos by --split all, or in training name a file of others by --dev-data"
        )
    if wanted not in sizes:
        found = ", ".join(f"{name} ({size} photos)" for name, size in sizes.items() if name)
        raise DataError(
            f"{file}: has no {wanted} split, only {found}: ask for that (of a COCO file, its name says which it is)"
        )
    return [entry for entry in entries if entry.split == wanted]


def _locate(entries: Sequence[Entry], file: Path, images: Path | None, check_images: bool) -> list[Record]:
    """Find the folder that the names start from (once, with a few photos), then build the records."""
    base = file.parent if images is None else images
    if not holds(base.is_dir):
        raise DataError(f"{base}: is not a folder; give the one that holds the photos of {file.name}")
    folders = (path for path in base.glob("*") if path.is_dir())
    roots = [base, *sorted(folders, key=lambda path: (path.name.lower() != "images", path.name))]
    # Karpathy's photos may lie in their `filepath` folders or all together.
    places = [(root, flat) for root in roots for flat in (False, True)]
    sample = entries[:: max(1, len(entries) // 16)]

    def path(place: tuple[Path, bool], entry: Entry) -> Path:
        root, flat = place
        return root / entry.names[-1 if flat else 0]

    best = max(places, key=lambda place: sum(holds(path(place, entry).is_file) for entry in sample))
    records = [Record(path(best, entry), entry.captions, entry.id, entry.domain) for entry in entries]
    if check_images and (missing := [record.image for record in records if not holds(record.image.is_file)]):
        raise DataError(
            f"{file}: {len(missing)} of its {len(records)} photos do not exist (the first: {missing[0]}); "
            "name the folder that they are in with --images"
        )
    return records
