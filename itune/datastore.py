"""Build datastores and add to them: captions, their embeddings, and an index over these when they are many.

A datastore appears whole or not at all, and one that is added to stays as it was until the larger one takes its place.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from . import __version__
from .backbones import VisionTower
from .caption_files import find_caption_file, holds
from .checkpoint import atomic_folder, hash_files, relative_source
from .data import Record, load_records
from .features import FeatureCache, LiveFeatures
from .retrieval import RetrievalHead, TextEncoder, load_encoder
from .runtime.datastore import (
    CAPTIONS,
    EMBEDDINGS,
    ENTRIES,
    IMAGES,
    MANIFEST,
    MEAN,
    Datastore,
    DatastoreManifest,
    centre,
)
from .runtime.engines.base import Float32
from .runtime.errors import DatastoreError
from .runtime.manifest import FileHash
from .runtime.settings import EncoderIdentity

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
    if output.exists() and not (force and (output / MANIFEST).is_file()):
        mend = "choose another --output" if force else "give another --output, --force to replace it, or use add"
        raise DatastoreError(f"{output} exists{' and is no datastore' if force else ''}: {mend}")
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
    """Add a caption file's photos to a datastore, but for those whose id it has already.

    `encoder` None is the one that the datastore names. The mean that was subtracted when it was built stays.

    Raises:
        DatastoreError: not a datastore, damaged, or of another encoder; there is nothing new to add.
    """
    base = Datastore.load(store, verify=True)
    manifest = base.manifest
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
    known = set() if base is None else {base.images[i] for i in range(len(base.images))}
    new = [record for record in records if record.id not in known]
    source.known = len(records) - len(new)
    if not new:
        raise DatastoreError(f"{source.captions}: all of its {len(records)} photos are in the datastore already")
    raw = folder / "raw.npy"
    photos: dict[str, int] = {}
    added = 0
    with ExitStack() as stack:
        entries = stack.enter_context(_ArrayWriter(folder / ENTRIES, np.int64, (3,)))
        captions = stack.enter_context(_TextWriter(folder, CAPTIONS))
        images = stack.enter_context(_TextWriter(folder, IMAGES))
        embeddings = stack.enter_context(_ArrayWriter(raw, np.float32, (identity.dim,)))
        if base is not None:
            entries.append(base.entries)
            for texts, there in ((captions, base.captions), (images, base.images)):
                texts.extend(there[i] for i in range(len(there)))
        for rows, batch in embedder.entries(new, source, report):
            embeddings.append(rows)
            for record, texts_of in batch:
                if record.id not in photos:
                    photos[record.id] = images.count
                    images.extend([record.id])
                start = captions.count
                captions.extend(texts_of)
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
        from .faiss_index import write_index

        nprobe = write_index(folder, base, report)
    sources = [] if base is None else list(base.manifest.provenance.get("sources", []))
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


def _write_embeddings(folder: Path, raw: Path, base: Datastore | None, dim: int, centered: bool, total: int) -> None:
    """`embeddings.npy`, and `mean.npy` where they are centred: float16 where only few of them are read for a query."""
    new: NDArray[np.float32] = np.load(raw, mmap_mode="r")
    mean: Float32 | None = None
    if centered:
        # That of the first captions stays, or every entry would have to be embedded again.
        mean = base.mean if base is not None else np.asarray(new.mean(axis=0, dtype=np.float64), np.float32)
        np.save(folder / MEAN, np.asarray(mean))
    dtype = np.float16 if total > FLAT_ENTRIES else np.float32
    with _ArrayWriter(folder / EMBEDDINGS, dtype, (dim,)) as writer:
        for start in range(0, 0 if base is None else base.manifest.entries, _CHUNK):
            assert base is not None
            writer.append(base.embeddings[start : start + _CHUNK])
        for start in range(0, len(new), _CHUNK):
            writer.append(centre(new[start : start + _CHUNK], mean))


class _ArrayWriter:
    """A .npy file that grows; its length is written at the end, into the room that NumPy leaves for it."""

    def __init__(self, path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.count = np.dtype(dtype), shape, 0
        self._file = path.open("wb")
        self._begin = self._header()

    def append(self, rows: NDArray[Any]) -> None:
        """Add `rows` [n, *shape]."""
        self._file.write(np.ascontiguousarray(rows, self.dtype).tobytes())
        self.count += len(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        if kind is None:
            self._file.seek(0)
            assert self._header() == self._begin
        self._file.close()

    def _header(self) -> int:
        content = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count, *self.shape)}
        npy.write_array_header_1_0(self._file, content)
        return self._file.tell()


class _TextWriter:
    """NAME.txt, a text a line, and NAME.npy, where each begins."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = (folder / f"{name}.txt").open("wb")
        self._path = folder / f"{name}.npy"
        self._offsets = array("q", [0])

    @property
    def count(self) -> int:
        """How many texts there are."""
        return len(self._offsets) - 1

    def extend(self, texts: Iterator[str] | Sequence[str]) -> None:
        """Add texts, their white space collapsed."""
        for text in texts:
            line = f"{' '.join(text.split())}\n".encode()
            self._file.write(line)
            self._offsets.append(self._offsets[-1] + len(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            np.save(self._path, np.frombuffer(self._offsets, np.int64))


__all__ = ["FLAT_ENTRIES", "Source", "add_to_datastore", "build_datastore"]
