"""Build datastores and add to them: captions, their embeddings, and an index when there are many.

A datastore appears whole or not at all; while one is added to, readers see the old one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..backbones import VisionTower
from ..checkpoint import relative_source
from ..data.features import FeatureCache, Features
from ..data.formats import caption_files, find_caption_file
from ..data.records import Record, load_records
from ..files import atomic_folder, hash_files, listed_files, only_writer, refuse_foreign, staged_folder
from ..progress import OnStage, silent
from ..runtime.engines.base import Float32
from ..runtime.errors import DatastoreError
from ..runtime.manifest import FileHash
from ..runtime.recovery import recover_folder
from ..runtime.retrieval.datastore import (
    CAPTIONS,
    EMBEDDINGS,
    ENTRIES,
    IMAGES,
    MANIFEST,
    MEAN,
    Datastore,
    DatastoreManifest,
    caption_key,
    centre,
)
from ..runtime.settings import EncoderIdentity
from .encoder import RetrievalHead, TextEncoder, load_encoder
from .options import CaptionSource, DatastoreOptions, Kind, Pooling
from .writers import require_faiss, write_index, write_rows, write_texts

FLAT_ENTRIES = 100_000
"""Larger datastores are searched through faiss."""
_TEXT_BATCH, _IMAGE_BATCH, _CHUNK = 256, 64, 1 << 14


@dataclass(frozen=True)
class Added:
    """What `build_datastore` and `add_to_datastore` did."""

    manifest: DatastoreManifest
    known: int
    """Photos that the datastore already had."""
    unreadable: dict[Path, str]
    """Photos that were left out, and why."""


def build_datastore(
    source: CaptionSource,
    encoder: str,
    output: Path,
    options: DatastoreOptions | None = None,
    progress: OnStage = silent,
) -> Added:
    """Build a datastore of a caption file's captions in the folder `output`.

    `encoder` is a vision tower, as in training.

    Raises:
        DatastoreError: another command is writing `output`, or no photo can be read.
        ItuneError: `output` exists, or the captions or the encoder cannot be loaded.
    """
    options = options or DatastoreOptions()
    with _only_writer(output), staged_folder(output, force=options.force, written=_written) as folder:
        return _build(folder, source, encoder, output, options, progress)


def _written(store: Path) -> set[str]:
    return listed_files(store / MANIFEST)


def _only_writer(store: Path) -> AbstractContextManager[None]:
    """Two writers at once would start from the same datastore, and one would be lost."""
    place = store.resolve()
    busy = f"{store}: another command is writing it; try again when it has finished"
    return only_writer(place.with_name(f".{place.name}.lock"), busy, DatastoreError)


def _build(
    folder: Path, source: CaptionSource, encoder: str, output: Path, options: DatastoreOptions, progress: OnStage
) -> Added:
    embedder = _Embedder(encoder, options.kind, options.pooling, source.cache_features, progress)
    identity = embedder.head.encoder.model_copy(update={"source": relative_source(encoder, output)})
    centered = embedder.kind == "image" if options.center is None else options.center
    return _write(folder, None, source, embedder, identity, centered)


def add_to_datastore(
    store: Path, source: CaptionSource, *, encoder: str | None = None, progress: OnStage = silent
) -> Added:
    """Add a caption file's photos to a datastore; skip those that it has already, by id and at least one caption.

    A photo whose id belongs to another photo there is added as FILE:ID. `encoder` None is the one that the datastore
    names. The mean that was subtracted when the datastore was built stays.

    Raises:
        DatastoreError: not a datastore, damaged, of another encoder, or in use by another addition; or there is nothing
            new to add.
    """
    recover_folder(store)
    if not store.is_dir():
        Datastore.load(store)  # raises
    with _only_writer(store):
        base = Datastore.load(store, verify=True)
        manifest = base.manifest
        own = _written(store)
        refuse_foreign(store, own)
        embedder = _Embedder(
            encoder or find_encoder(base), manifest.kind, manifest.encoder.pooling, source.cache_features, progress
        )
        base.require(embedder.head.encoder)
        with atomic_folder(store, own) as folder:
            return _write(folder, base, source, embedder, manifest.encoder, manifest.centered)


def find_encoder(store: Datastore) -> str:
    """Return where a datastore's encoder is: the datastore names it by a hub id or a path relative to its folder."""
    source = store.manifest.encoder.source
    beside = store.folder / source
    if beside.exists():
        return str(beside)
    if source.startswith((".", "/")) or source.count("/") > 1:
        raise DatastoreError(f"{store.folder}: its encoder {source} does not exist; name it with --encoder")
    return source


def encoder_of(store: Datastore, encoder: str | None = None) -> tuple[VisionTower, RetrievalHead]:
    """Load the tower and head that search a datastore; `encoder` is their place if they were moved.

    Raises DatastoreError if it is another encoder.
    """
    tower, head = load_encoder(encoder or find_encoder(store), pooling=store.manifest.encoder.pooling)
    store.require(head.encoder)
    return tower, head


_Batch = tuple[Float32, Sequence[tuple[Record, Sequence[str]]]]
"""Embeddings [entries, D], and the (record, captions) of each entry."""


class _Embedder:
    """Turns records into entries: captions or photos with their embeddings."""

    def __init__(
        self, source: str, kind: Kind | None, pooling: Pooling | None, cache: Path | None, progress: OnStage
    ) -> None:
        self.tower, self.head = load_encoder(source, pooling=pooling or ("projection" if kind == "text" else None))
        config = self.tower.folder / "config.json"
        has_text = config.is_file() and '"text_config"' in config.read_text("utf-8")
        self.kind = kind or ("text" if has_text and self.head.encoder.pooling == "projection" else "image")
        self.texts = TextEncoder(source) if self.kind == "text" else None
        self.cache, self.progress = cache, progress
        self.unreadable: dict[Path, str] = {}

    def entries(self, records: Sequence[Record]) -> Iterator[_Batch]:
        """Embed the captions or photos of `records`; adds to `unreadable`."""
        if self.texts is None:
            yield from self._photos(records)
            return
        pairs = [(record, (caption,)) for record in records for caption in record.captions]
        for start in range(0, len(pairs), _TEXT_BATCH):
            batch = pairs[start : start + _TEXT_BATCH]
            yield self.texts.embed([caption for _, (caption,) in batch]), batch
            self.progress("embedding captions", start + len(batch), len(pairs))

    def _photos(self, records: Sequence[Record]) -> Iterator[_Batch]:
        features = Features(self.tower) if self.cache is None else FeatureCache(self.cache, self.tower)
        if self.cache is not None:
            images = [record.image for record in records]
            self.unreadable |= features.prepare(images, progress=partial(self.progress, "reading photos"))
        for start in range(0, len(records), _IMAGE_BATCH):
            batch = records[start : start + _IMAGE_BATCH]
            visual, unreadable = features.embed([record.image for record in batch])
            self.unreadable |= unreadable
            readable = [(record, record.captions) for record in batch if record.image not in unreadable]
            if readable:
                yield self.head.pool(visual).cpu().numpy(), readable
            self.progress("embedding photos", start + len(batch), len(records))


def _write(
    folder: Path,
    base: Datastore | None,
    source: CaptionSource,
    embedder: _Embedder,
    identity: EncoderIdentity,
    centered: bool,
) -> Added:
    """Write a datastore into the empty `folder`: the entries of `base` first, then those of `source`."""
    split = None if source.split == "all" else source.split
    captions_file = find_caption_file(source.captions)
    records = load_records(captions_file, images=source.images, split=split, check_images=embedder.kind == "image")
    names = _names(records, base, source.captions.stem)
    new = [record for record in records if record.id in names]
    coming = len(new) if embedder.kind == "image" else sum(len(record.captions) for record in new)
    old = np.empty((0, 3), np.int64) if base is None else base.entries
    if len(old) + coming > FLAT_ENTRIES:
        require_faiss()  # before hours of embedding
    first_caption, first_image = (0, 0) if base is None else (base.manifest.captions, base.manifest.images)
    photos: dict[str, int] = {}
    captions: list[str] = []
    entries = array("q")  # image, first caption, and the one after the last
    raw = folder / "raw.f32"
    with raw.open("wb") as file:
        for rows, batch in embedder.entries(new):
            file.write(np.asarray(rows, np.float32).tobytes())
            for record, texts in batch:
                photo = photos.setdefault(record.id, first_image + len(photos))
                start = first_caption + len(captions)
                captions += (" ".join(text.split()) for text in texts)
                entries.extend((photo, start, first_caption + len(captions)))
    known = len(records) - len(new)
    if not entries:
        unreadable = "".join(f"; {reason}" for reason in list(embedder.unreadable.values())[:1])
        raise DatastoreError(
            f"{source.captions}: has no photo to add: of {len(records)}, {known} are in the datastore already and "
            f"{len(embedder.unreadable)} cannot be read{unreadable}"
        )
    table = np.concatenate([old, np.frombuffer(entries, np.int64).reshape(-1, 3)])
    total = len(table)
    np.save(folder / ENTRIES, table)
    write_texts(folder, CAPTIONS, chain(base.captions if base else (), captions))
    write_texts(folder, IMAGES, chain(base.images if base else (), (names[photo] for photo in photos)))
    _write_embeddings(folder, np.memmap(raw, np.float32, mode="r").reshape(-1, identity.dim), base, centered, total)
    raw.unlink()
    approximate = total > FLAT_ENTRIES
    nprobe = write_index(folder, base, embedder.progress) if approximate else 0
    added = {
        "file": captions_file.name,
        "sha256": hash_files(caption_files(captions_file)),
        "split": split,
        "photos": len(photos),
        "captions": len(captions),
        "added": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    manifest = DatastoreManifest(
        kind=embedder.kind,
        encoder=identity,
        entries=total,
        captions=first_caption + len(captions),
        images=first_image + len(photos),
        index="ivf" if approximate else "flat",
        nprobe=nprobe,
        centered=centered,
        files={path.name: FileHash.of(path) for path in sorted(folder.iterdir())},
        provenance={"itune": __version__, "sources": [*(base.manifest.sources if base else []), added]},
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Added(manifest, known, embedder.unreadable)


def _write_embeddings(folder: Path, new: Float32, base: Datastore | None, centered: bool, total: int) -> None:
    """Write `embeddings.npy`, and `mean.npy` if they are centred: float16 where a query reads only a few of them."""
    mean: Float32 | None = None
    if centered:
        # The first mean stays, or every entry would have to be embedded again.
        mean = base.mean if base is not None else np.asarray(new.mean(axis=0, dtype=np.float64), np.float32)
        np.save(folder / MEAN, np.asarray(mean))

    def chunks() -> Iterator[NDArray[Any]]:
        for start in range(0, total - len(new), _CHUNK):
            assert base is not None
            yield base.embeddings[start : start + _CHUNK]
        yield from (centre(new[start : start + _CHUNK], mean) for start in range(0, len(new), _CHUNK))

    dtype = np.float16 if total > FLAT_ENTRIES else np.float32
    write_rows(folder / EMBEDDINGS, dtype, (total, new.shape[1]), chunks())


def photos_in(store: Datastore, records: Sequence[Record]) -> int:
    """Count the photos that a datastore contains with one of their captions."""
    there = _captions_of(store, {record.id for record in records})
    return sum(not _keys(record).isdisjoint(there.get(record.id, ())) for record in records)


def _names(records: Sequence[Record], base: Datastore | None, file: str) -> dict[str, str]:
    """Return the names of the new photos by id: the id itself, or FILE:ID if another photo has that id.

    Several files may number their photos from 0. Two photos are the same if they have a common caption.
    """
    if base is None:
        return {record.id: record.id for record in records}
    there = _captions_of(base, {name for record in records for name in (record.id, f"{file}:{record.id}")})
    names = {}
    for record in records:
        taken = [name for name in (record.id, f"{file}:{record.id}") if name in there]
        if any(_keys(record) & there[name] for name in taken):
            continue
        if len(taken) == 2:
            raise DatastoreError(f"{base.folder}: other photos have the ids {taken}; rename the file")
        names[record.id] = f"{file}:{record.id}" if record.id in there else record.id
    return names


def _keys(record: Record) -> set[str]:
    return {caption_key(caption) for caption in record.captions}


def _captions_of(base: Datastore, images: set[str]) -> Mapping[str, set[str]]:
    """Return the captions (as `caption_key`) of the `images` that the datastore contains."""
    found = {i: name for i, name in enumerate(base.images) if name in images}
    captions: dict[str, set[str]] = {name: set() for name in found.values()}
    for image, start, end in base.entries[np.isin(base.entries[:, 0], list(found))].tolist():
        captions[found[image]].update(caption_key(base.captions[i]) for i in range(start, end))
    return captions
