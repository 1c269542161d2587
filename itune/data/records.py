"""Read any caption file into a list of `Record(image, captions, id)`.

Formats, recognised by content: Flickr8k and Flickr30k token files with their split lists; Karpathy's JSON
(dataset_coco.json and the like); JSON Lines of `{"image": ..., "captions": [...]}` with an optional "split", "id" and
"domain"; annotation files of COCO and NoCaps.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import reading
from .formats import DataError, Entry, find_caption_file, read_entries, split_name


@dataclass(frozen=True)
class Record:
    """A photo and its captions, stripped and without empty ones.

    `id` is the data set's own (COCO's id, Karpathy's cocoid or imgid, JSONL's "id"), else the photo's name without its
    suffix. It does not depend on other photos, so results of different runs can be compared by it.
    """

    image: Path
    captions: tuple[str, ...]
    id: str
    domain: str | None = None
    """NoCaps' in-domain, near-domain or out-domain; other files may use other names."""


def load_records(
    source: Path,
    *,
    images: Path | None = None,
    split: str | None = "train",
    undivided: bool = False,
    check_images: bool = True,
    captioned: bool = True,
) -> list[Record]:
    """Read the photos of one split in the file's order; `split` None reads all of them.

    `source` is a caption file, or a folder that contains exactly one. Photo names are relative to the folder `images`
    (default: the file's own) or to one of its subfolders. "val" and "validation" mean "dev", Karpathy's "restval" means
    "train". A file without splits is all "train"; with `undivided` it serves as any split. Photos without captions are
    left out, unless `captioned` is False and no photo has any, as in a test split.

    Raises DataError, naming the file and the line or field, if the file cannot be read or contradicts itself; with
    `check_images`, also if photos are missing.
    """
    file = find_caption_file(source)
    entries = read_entries(file)
    splits = Counter(entry.split for entry in entries if entry.captions or not captioned)
    wanted = None if split is None else split_name(split)
    everything = wanted is None or (set(splits) == {None} and (wanted == "train" or undivided))
    entries = entries if everything else [entry for entry in entries if entry.split == wanted]
    with_captions = [entry for entry in entries if entry.captions]
    entries = with_captions if captioned or with_captions else entries
    if not entries:
        found = ", ".join(f"{name or 'no split'} ({size} photos)" for name, size in splits.items())
        raise DataError(
            f"{file}: no captions for split {wanted or 'all'}; found {found or 'no photos'}; choose another "
            'split or file, or mark splits: a "split" on each line, lists beside a token file, the name of a COCO file'
        )
    return _locate(entries, file, images, check_images)


def split_records(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Hold out about `fraction` of the records: (train, dev), both in the records' order and never empty.

    A record's side depends only on its id and the seed, so adding photos moves no other (except where a side would
    have been empty).
    """
    if not (0 < fraction < 1 and len(records) > 1):
        raise DataError(
            f"cannot hold out the fraction {fraction} of {len(records)} photos: it must lie between 0 and 1 and leave "
            "photos for both train and dev"
        )

    def position(record: Record) -> float:
        digest = hashlib.blake2b(f"{seed}/{record.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    positions = sorted(map(position, records))
    limit = min(max(fraction, positions[0]), positions[-2])
    train = [record for record in records if position(record) > limit]
    return train, [record for record in records if position(record) <= limit]


def _locate(entries: Sequence[Entry], file: Path, images: Path | None, check_images: bool) -> list[Record]:
    """Find the folder that the names start from, by a sample of the photos, then build the records."""
    base = file.parent if images is None else images
    with reading(base, DataError):
        folders = [path for path in base.glob("*") if path.is_dir()]
    folders.sort(key=lambda path: (path.name.lower() != "images", path.name))
    sample = entries[:: max(1, len(entries) // 16)]

    # Karpathy's photos may lie in their `filepath` folders (first name) or all together (last name).
    places = [(root, name) for root in (base, *folders) for name in (0, -1)]
    root, name = max(places, key=lambda place: sum(_exists(place[0] / entry.names[place[1]]) for entry in sample))
    records = [Record(root / entry.names[name], entry.captions, entry.id, entry.domain) for entry in entries]
    if check_images and (missing := [record.image for record in records if not _exists(record.image)]):
        raise DataError(
            f"{file}: {len(missing)} of {len(records)} photos do not exist (the first: {missing[0]}); name their "
            "folder with --images"
        )
    return records


def _exists(photo: Path) -> bool:
    try:
        return photo.is_file()
    except OSError:  # the name is too long
        return False
