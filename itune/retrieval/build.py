"""Build datastores and add to them: captions, their embeddings, and an index over these when they are many.

A datastore appears whole or not at all, and one that is added to stays as it was until the larger one takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..backbones import VisionTower
from ..checkpoint import relative_source
from ..data.features import FeatureCache, LiveFeatures
from ..data.formats import find_caption_file, holds
from ..data.records import Record, load_records
from ..files import atomic_folder, hash_files, keep_foreign, listed_files
from ..locking import only_writer
from ..runtime.engines.base import Float32
from ..runtime.errors import DatastoreError
from ..runtime.manifest import FileHash
from ..runtime.retrieval.datastore import (
    CAPTIONS,
    EMBEDDINGS,
    ENTRIES,
    IMAGES,
    MANIFEST,
    MEAN,
    Datastore,
    DatastoreManifest,
    Texts,
    caption_key,
    centre,
)
from ..runtime.settings import EncoderIdentity
from .encoder import RetrievalHead, TextEncoder, load_encoder
from .faiss_index import require_faiss, write_index
from .writers import ArrayWriter, TextWriter

Kind = Literal["text", "image"]
Report = Callable[[str, int, int], None]
"""Told (what is being done, how much of it, of how much)."""
FLAT_ENTRIES = 100_000
"""Up to so many entries are searched one by one, more through faiss."""
_TEXT_BATCH, _IMAGE_BATCH, _CHUNK = 256, 64, 1 << 14


@dataclass
class Source:
    """A caption file to be put into a datastore, and what became of it."""

    captions: Path
    images: Path | None = None
    split: str | None = "train"
    cache: Path | None = None
    """A feature cache, as training fills it, to read and fill."""
    known: int = 0
    """Photos that were in the datastore already."""
    unreadable: dict[Path, str] = field(default_factory=dict)

    def records(self, kind: Kind) -> list[Record]:
        """Its photos; whether they exist matters only where they are embedded."""
        return load_records(self.captions, images=self.images, split=self.split, check_images=kind == "image")

    def provenance(self, photos: int, captions: int) -> dict[str, Any]:
        """What the datastore says about it."""
        file = find_caption_file(self.captions) if holds(self.captions.is_dir) else self.captions
        return {
            "file": file.name,
            "sha256": hash_files([file]),
            "split": self.split,
            "photos": photos,
            "captions": captions,
            "added": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def build_datastore(
    source: Source,
    encoder: str,
    output: Path,
    *,
    kind: Kind | None = None,
    pooling: Literal["mean", "projection"] | None = None,
    center: bool | None = None,
    force: bool = False,
    report: Report = lambda _what, _done, _total: None,
) -> DatastoreManifest:
    """Build a datastore of a caption file's captions in the folder `output`.

    `encoder` is a vision tower, as in training. `kind` "text" embeds the captions by the text tower of the same CLIP
    checkpoint, "image" the photos; None is "text" where there is such a tower. `center` subtracts the embeddings' mean
    (None: of photos, not of captions). `force` replaces a datastore.

    Raises:
        DatastoreError: `output` exists, or no photo can be read.
        ItuneError: the captions or the encoder cannot be loaded.
    """
    if output.exists() and not (output / MANIFEST).is_file():
        raise DatastoreError(f"{output} exists and is no datastore: choose another --output")
    if output.exists() and not force:
        raise DatastoreError(f"{output} exists: give another --output, --force to replace it, or use add")
    if output.exists():
        keep_foreign(output, listed_files(output / MANIFEST))
    embedder = _Embedder.load(encoder, kind, pooling)
    identity = embedder.head.encoder
    identity = identity.model_copy(update={"source": relative_source(encoder, output)})
    centered = embedder.kind == "image" if center is None else center
    with atomic_folder(output) as folder:
        return _write(folder, None, identity, source, embedder, centered, report)


def add_to_datastore(
    store: Path,
    source: Source,
    *,
    encoder: str | None = None,
    report: Report = lambda _what, _done, _total: None,
) -> DatastoreManifest:
    """Add a caption file's photos to a datastore, but for those that it has already: the same id and caption.

    A photo whose id is another photo's there is added as FILE:ID. `encoder` None is the one that the datastore names.
    The mean that was subtracted when it was built stays.

    Raises:
        DatastoreError: not a datastore, damaged, of another encoder, or somebody else is adding to it; there is nothing
            new to add.
    """
    if not store.is_dir():
        Datastore.load(store)  # says what is wrong
    # Two additions at a time would start from the same datastore, and one of them be lost.
    place = store.resolve()
    busy = f"{store}: another command is adding to it; add again when that has ended"
    with only_writer(place.with_name(f".{place.name}.lock"), busy, DatastoreError):
        base = Datastore.load(store, verify=True)
        manifest = base.manifest
        keep_foreign(store, listed_files(store / MANIFEST))
        embedder = _Embedder.load(encoder or find_encoder(base), manifest.kind, manifest.encoder.pooling)
        base.require(embedder.head.encoder)
        with atomic_folder(store) as folder:
            return _write(folder, base, manifest.encoder, source, embedder, manifest.centered, report)


def find_encoder(store: Datastore) -> str:
    """Where the encoder of a datastore is, which names it by a hub id or a path relative to its folder."""
    source = store.manifest.encoder.source
    beside = store.folder / source
    if beside.exists():
        return str(beside)
    if source.startswith((".", "/")) or source.count("/") > 1:
        raise DatastoreError(f"{store.folder}: its encoder {source} is not there any more; name it with --encoder")
    return source


def encoder_of(store: Datastore, encoder: str | None = None) -> tuple[VisionTower, RetrievalHead]:
    """The tower and head that a datastore is searched with; `encoder` names them where they are no longer in place.

    Raises:
        DatastoreError: it is another encoder.
    """
    tower, head = load_encoder(encoder or find_encoder(store), pooling=store.manifest.encoder.pooling)
    store.require(head.encoder)
    return tower, head


class _Embedder:
    """What turns records into entries."""

    def __init__(self, kind: Kind, tower: VisionTower, head: RetrievalHead, texts: TextEncoder | None) -> None:
        self.kind, self.tower, self.head, self.texts = kind, tower, head, texts

    @classmethod
    def load(cls, source: str, kind: Kind | None, pooling: Literal["mean", "projection"] | None) -> Self:
        tower, head = load_encoder(source, pooling=pooling or ("projection" if kind == "text" else None))
        if kind is None:
            kind = "text" if head.encoder.pooling == "projection" and _has_text_tower(tower.folder) else "image"
        if kind == "text" and head.encoder.pooling == "mean":
            raise DatastoreError(f"{source}: captions are found by CLIP's projection; --kind text contradicts the mean")
        return cls(kind, tower, head, TextEncoder(source) if kind == "text" else None)

    def entries(self, records: Sequence[Record], source: Source, report: Report) -> Iterator[tuple[Float32, list[Any]]]:
        """Batches of embeddings [entries, D] and their (record, captions)."""
        if self.texts is None:
            yield from self._photos(records, source, report)
            return
        pairs = [(record, (caption,)) for record in records for caption in record.captions]
        for start in range(0, len(pairs), _TEXT_BATCH):
            batch = pairs[start : start + _TEXT_BATCH]
            yield self.texts.embed([captions[0] for _, captions in batch]), batch
            report("embedding captions", start + len(batch), len(pairs))

    def _photos(self, records: Sequence[Record], source: Source, report: Report) -> Iterator[tuple[Float32, list[Any]]]:
        live = LiveFeatures(self.tower)
        cache = None if source.cache is None else FeatureCache(source.cache, self.tower)
        if cache is not None:
            paths = [record.image for record in records]
            source.unreadable |= cache.prepare(
                paths, progress=lambda done, total: report("reading photos", done, total)
            )
        for start in range(0, len(records), _IMAGE_BATCH):
            batch = [
                record for record in records[start : start + _IMAGE_BATCH] if record.image not in source.unreadable
            ]
            paths = [record.image for record in batch]
            if cache is None:
                visual, bad = live.embed(paths, [False] * len(paths))
                source.unreadable |= bad
                batch = [record for record in batch if record.image not in bad]
            else:
                visual = cache.read(paths)
            if batch:
                yield self.head.pool(visual).cpu().numpy(), [(record, record.captions) for record in batch]
            report("embedding photos", min(start + _IMAGE_BATCH, len(records)), len(records))


def _has_text_tower(folder: Path) -> bool:
    return (folder / "config.json").is_file() and '"text_config"' in (folder / "config.json").read_text("utf-8")


def _write(
    folder: Path,
    base: Datastore | None,
    identity: EncoderIdentity,
    source: Source,
    embedder: _Embedder,
    centered: bool,
    report: Report,
) -> DatastoreManifest:
    records = source.records(embedder.kind)
    names = _names(records, base, source.captions.stem)
    new = [record for record in records if record.id in names]
    source.known = len(records) - len(new)
    if not new:
        raise DatastoreError(f"{source.captions}: all of its {len(records)} photos are in the datastore already")
    coming = len(new) if embedder.kind == "image" else sum(len(record.captions) for record in new)
    if (0 if base is None else base.manifest.entries) + coming > FLAT_ENTRIES:
        require_faiss()  # rather now than after hours of embedding
    raw = folder / "raw.npy"
    photos: dict[str, int] = {}
    added = 0
    with ExitStack() as stack:
        entries = stack.enter_context(ArrayWriter(folder / ENTRIES, np.int64, (3,)))
        captions = stack.enter_context(TextWriter(folder, CAPTIONS))
        images = stack.enter_context(TextWriter(folder, IMAGES))
        embeddings = stack.enter_context(ArrayWriter(raw, np.float32, (identity.dim,)))
        if base is not None:
            entries.append(base.entries)
            for texts, there in ((captions, base.captions), (images, base.images)):
                texts.extend(_each(there))
        for rows, batch in embedder.entries(new, source, report):
            embeddings.append(rows)
            for record, texts_of in batch:
                if record.id not in photos:
                    photos[record.id] = images.count
                    images.extend([names[record.id]])
                start = captions.count
                captions.extend(" ".join(text.split()) for text in texts_of)
                added += len(texts_of)
                entries.append(np.array([[photos[record.id], start, captions.count]]))
        if not photos:
            reason = next(iter(source.unreadable.values()), "")
            raise DatastoreError(f"{source.captions}: none of its photos can be read ({reason})")
    total = entries.count
    _write_embeddings(folder, raw, base, identity.dim, centered, total)
    raw.unlink()
    nprobe = 0
    if total > FLAT_ENTRIES:
        nprobe = write_index(folder, base, report)
    sources = [] if base is None else base.manifest.sources
    manifest = DatastoreManifest(
        kind=embedder.kind,
        encoder=identity,
        entries=total,
        captions=captions.count,
        images=images.count,
        index="ivf" if total > FLAT_ENTRIES else "flat",
        nprobe=nprobe,
        centered=centered,
        files={path.name: FileHash.of(path) for path in sorted(folder.iterdir())},
        provenance={"itune": __version__, "sources": [*sources, source.provenance(len(photos), added)]},
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def photos_in(store: Datastore, records: Sequence[Record]) -> int:
    """How many photos are in a datastore with a caption of their own."""
    there = _captions_of(store, {record.id for record in records})
    return sum(
        any(caption_key(caption) in there.get(record.id, ()) for caption in record.captions) for record in records
    )


def _names(records: Sequence[Record], base: Datastore | None, file: str) -> dict[str, str]:
    """What new photos are called in the datastore, by their id: that is theirs, unless another photo there has it.

    Files number their photos from 0, each for itself: the same photo has one of its captions there.
    """
    own: dict[str, str] = {record.id: record.id for record in records}
    if base is None:
        return own
    again = {record.id: f"{file}:{record.id}" for record in records}
    there = _captions_of(base, {*own, *again.values()})
    names = {}
    for record in records:
        captions = {caption_key(caption) for caption in record.captions}
        places = [name for name in (record.id, again[record.id]) if name in there]
        if any(captions & there[name] for name in places):
            continue
        if len(places) == 2:
            raise DatastoreError(
                f"{base.folder}: has other photos of the ids {places[0]!r} and {places[1]!r} already; rename the file"
            )
        names[record.id] = again[record.id] if record.id in there else record.id
    return names


def _captions_of(base: Datastore, images: set[str]) -> Mapping[str, set[str]]:
    """The captions, as `caption_key` has them, of those of `images` that the datastore holds."""
    found = {i: name for i, name in enumerate(_each(base.images)) if name in images}
    captions: dict[str, set[str]] = {name: set() for name in found.values()}
    for image, start, end in base.entries[np.isin(base.entries[:, 0], list(found))].tolist():
        captions[found[image]].update(caption_key(base.captions[i]) for i in range(start, end))
    return captions


def _each(texts: Texts) -> Iterator[str]:
    return (texts[i] for i in range(len(texts)))


def _write_embeddings(folder: Path, raw: Path, base: Datastore | None, dim: int, centered: bool, total: int) -> None:
    """`embeddings.npy`, and `mean.npy` where they are centred: float16 where only few of them are read for a query."""
    new: NDArray[np.float32] = np.load(raw, mmap_mode="r")
    mean: Float32 | None = None
    if centered:
        # That of the first captions stays, or every entry would have to be embedded again.
        mean = base.mean if base is not None else np.asarray(new.mean(axis=0, dtype=np.float64), np.float32)
        np.save(folder / MEAN, np.asarray(mean))
    dtype = np.float16 if total > FLAT_ENTRIES else np.float32
    with ArrayWriter(folder / EMBEDDINGS, dtype, (dim,)) as writer:
        for start in range(0, 0 if base is None else base.manifest.entries, _CHUNK):
            assert base is not None
            writer.append(base.embeddings[start : start + _CHUNK])
        for start in range(0, len(new), _CHUNK):
            writer.append(centre(new[start : start + _CHUNK], mean))


__all__ = ["FLAT_ENTRIES", "Source", "add_to_datastore", "build_datastore", "photos_in"]
