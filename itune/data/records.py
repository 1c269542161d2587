"""Read any caption file into a list of `Record(image, captions, id)`.

Formats, recognised by content: Flickr8k and Flickr30k token files with their split lists; Karpathy's JSON
(dataset_coco.json and the like); JSON Lines, or a JSON list, of `{"image": ..., "captions": [...]}` with an optional
"split", "id" and "domain"; an object of captions by photo; annotation files of COCO and NoCaps; tables (CSV, TSV) of
photos and captions; a text file beside each photo.
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from ..files import hash_files
from ..runtime.errors import printable, reading
from .formats import DataError, Entry, find_caption_file, read_entries, split_name


@dataclass(frozen=True)
class Record:
    """A photo and its captions, stripped.

    `id` is the data set's own (COCO's id, Karpathy's cocoid or imgid, JSONL's "id"), else the photo's name without its
    suffix. It does not depend on other photos, so results of different runs can be compared by it.
    """

    image: Path
    captions: tuple[str, ...]
    id: str
    domain: str | None = None
    """NoCaps' in-domain, near-domain or out-domain; other files may use other names."""
    wordless: tuple[str, ...] = ()
    """Captions without a letter or digit, such as ".": nothing to learn, but the COCO code scores against them."""
    weight: float = 1.0
    """How many times an epoch of training draws the photo; a fraction draws that share of the photos."""

    @property
    def references(self) -> tuple[str, ...]:
        """The captions to score against."""
        return self.captions + self.wordless


def load_records(
    source: Path,
    *,
    images: Path | None = None,
    split: str | None = "train",
    undivided: bool = False,
    check_images: bool = True,
    skip_missing: bool = False,
    captioned: bool = True,
    mend: str = "choose another --split or file",
) -> list[Record]:
    """Read the photos of one split in the file's order; `split` None reads all of them.

    `source` is a caption file, or a folder that contains exactly one. Photo names are relative to the folder `images`
    (default: the file's own) or to one of its subfolders. "val" and "validation" mean "dev", Karpathy's "restval" means
    "train". A file without splits is all "train"; with `undivided` it serves as any split. Photos without captions are
    left out, unless `captioned` is False and no photo has any, as in a test split. `mend` is what to do about a split
    without photos.

    Raises DataError, naming the file and the line or field, if the file cannot be read or contradicts itself; with
    `check_images`, also if photos are missing, unless `skip_missing` leaves them out with a warning.
    """
    file = find_caption_file(source)
    entries = read_entries(file)
    total = len(entries)

    def usable(entry: Entry) -> bool:
        return any(map(_has_words, entry.captions)) if captioned else bool(entry.captions)

    splits = Counter(entry.split for entry in entries if usable(entry) or not captioned)
    wanted = None if split is None else split_name(split)
    everything = wanted is None or (set(splits) == {None} and (wanted == "train" or undivided))
    entries = entries if everything else [entry for entry in entries if entry.split == wanted]
    with_captions = [entry for entry in entries if usable(entry)]
    entries = with_captions if captioned or with_captions else entries
    if not entries:
        found = ", ".join(f"{name or 'no split'} ({size} photos)" for name, size in splits.items())
        if not splits:
            raise DataError(
                f"{file}: split {wanted or 'all'} is empty: none of {total} photos has a caption with a word"
            )
        raise DataError(
            f"{file}: no captions for split {wanted or 'all'}; found {found or 'no photos'}; {mend}, or mark splits: a "
            '"split" for each photo, lists beside a token file, the name of a COCO file'
        )
    records = _locate(entries, file if file.is_dir() else file.parent, images)
    missing = [record.image for record in records if not _exists(record.image)] if check_images else []
    if missing and not (skip_missing and len(missing) < len(records)):
        raise DataError(
            f"{file}: {len(missing)} of {len(records)} photos do not exist (the first: {_with_case(missing[0])}); name "
            "their folder with --images, or leave them out with --skip-missing"
        )
    if missing:
        left_out = f"left out {len(missing)} of {len(records)} photos that do not exist (the first: {missing[0]})"
        logging.getLogger(__name__).warning("%s", printable(f"{file}: {left_out}"))
        gone = set(missing)
        records = [record for record in records if record.image not in gone]
    return records


def split_records(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Hold out about `fraction` of the records: (train, dev), both in the records' order and never empty.

    A record's side depends only on its id and the seed, so adding photos moves no other (except where a side would
    have been empty). Photos of the same content are on one side, that of the first id among them.
    """
    if not (0 < fraction < 1 and len(records) > 1):
        raise DataError(
            f"cannot hold out the fraction {fraction} of {len(records)} photos: it must lie between 0 and 1 and leave "
            "photos for both train and dev"
        )

    twins = identical_photos([record.image for record in records])
    first: dict[Path, str] = {}
    for record in sorted(records, key=lambda record: record.id):
        first.setdefault(twins[record.image], record.id)

    def position(record: Record) -> float:
        digest = hashlib.blake2b(f"{seed}/{first[twins[record.image]]}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    positions = sorted(map(position, records))
    limit = min(max(fraction, positions[0]), positions[-2])
    train = [record for record in records if position(record) > limit]
    return train, [record for record in records if position(record) <= limit]


def short_names(files: Sequence[Path]) -> list[str]:
    """Name caption files or folders by their stems, with as many folders before these as tell them apart.

    Raises DataError if a file is named twice.
    """
    parts = [(*path.parent.parts, path.name if path.is_dir() else path.stem) for path in map(Path.resolve, files)]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(each[-depth:]) for each in parts]
        if len({*names}) == len(names):
            return names
    raise DataError(f"{max(files, key=files.count)} is named twice: name it once, with a --data-weight")


def identical_photos(photos: Sequence[Path]) -> dict[Path, Path]:
    """Map each photo to the first one of the same content; a file that cannot be read is equal to none."""
    sizes: dict[int, list[Path]] = defaultdict(list)
    for photo in dict.fromkeys(photos):
        sizes[photo.stat().st_size if _exists(photo) else -1].append(photo)
    found: dict[Path, Path] = {}
    for size, same_size in sizes.items():
        first: dict[str, Path] = {}
        for photo in same_size:
            alone = size < 0 or len(same_size) == 1
            found[photo] = photo if alone else first.setdefault(hash_files([photo]), photo)
    return found


def _locate(entries: Sequence[Entry], base: Path, images: Path | None) -> list[Record]:
    """Find the folder that the names start from, by a sample of the photos, then build the records."""
    base = base if images is None else images
    with reading(base, DataError):
        folders = [path for path in base.glob("*") if path.is_dir()]
    folders.sort(key=lambda path: (path.name.lower() != "images", path.name))
    sample = entries[:: max(1, len(entries) // 16)]

    # Karpathy's photos may lie in their `filepath` folders (first name) or all together (last name).
    places = [(root, name) for root in (base, *folders) for name in (0, -1)]
    counts = [sum(_exists(_find(root, entry.names[name])) for entry in sample) for root, name in places]
    root, name = places[counts.index(max(counts))]
    others = {place[0] for place, count in zip(places, counts, strict=True) if count == max(counts) > 0} - {root}
    if others and images is None and root != base:
        raise DataError(f"{base}: both {root.name} and {min(others).name} have the photos; name one with --images")
    records = []
    for entry in entries:
        words = tuple(filter(_has_words, entry.captions))
        wordless = tuple(caption for caption in entry.captions if not _has_words(caption))
        records.append(Record(_find(root, entry.names[name]), words, entry.id, entry.domain, wordless))
    return records


def _find(root: Path, name: str) -> Path:
    """The path of a photo, whose name may be spelled in another Unicode normal form than the file's."""
    path = root / name
    if name.isascii() or _exists(path):
        return path
    found = root
    for part in PurePosixPath(name).parts:
        found /= _names_in(found).get(unicodedata.normalize("NFC", part), part)
    return found


def _with_case(photo: Path) -> str:
    """A missing photo, with the file that has its name in another case, if there is one."""
    names = _names_in(photo.parent)
    other = next((own for name, own in names.items() if name.casefold() == photo.name.casefold()), None)
    return f"{photo}, but there is {other}" if other else str(photo)


@cache
def _names_in(folder: Path) -> dict[str, str]:
    """The names in a folder by their composed Unicode form (NFC)."""
    try:
        return {unicodedata.normalize("NFC", path.name): path.name for path in folder.iterdir()}
    except OSError:
        return {}


def _has_words(caption: str) -> bool:
    return any(map(str.isalnum, caption))


def _exists(photo: Path) -> bool:
    try:
        return photo.is_file()
    except OSError:  # the name is too long
        return False
