"""The datastore: captions that are found by an image's embedding, in a folder described by its `datastore.json`.

An entry is a caption with its text embedding (kind "text": image-to-text retrieval, as in SmallCap), or a photo's
embedding with all its captions (kind "image": image-to-image). All files except the manifest are memory-mapped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from pydantic import Field

from ..engines.base import Float32, Int64
from ..errors import DatastoreError, reading
from ..manifest import FileHash, FileName, ManifestFolder, Positive
from ..settings import EncoderIdentity, Settings
from .consensus import NGramWeights, consensus
from .nearest import Ranking, load_ivf

FORMAT: Literal[1] = 1
MANIFEST = "datastore.json"
EMBEDDINGS, MEAN, ENTRIES, INDEX = "embeddings.npy", "mean.npy", "entries.npy", "index.faiss"
CAPTIONS, IMAGES = "captions", "images"
NEIGHBOURS = 20
"""Photos of an "image" datastore whose captions are compared; more where these have too few captions."""
_SHARPNESS = 5.0
"""A photo's vote for typical captions is exp(_SHARPNESS * similarity)."""
_SAMPLED = 2000  # captions from which the rarity of words is counted
_HASHED_BYTES = 64 << 20


class DatastoreManifest(Settings):
    """The content of `datastore.json`."""

    format: Literal[1] = FORMAT  # first, so that another version is the first error
    kind: Literal["text", "image"]
    """What was embedded: captions, or photos."""
    encoder: EncoderIdentity
    entries: Positive
    captions: Positive
    images: Positive
    index: Literal["flat", "ivf"]
    """Exact search, or faiss's inverted lists."""
    nprobe: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    """Inverted lists that a query looks through; 0 for "flat"."""
    centered: bool
    """Whether the mean embedding (`mean.npy`) was subtracted from the entries, and must be from queries."""
    files: dict[FileName, FileHash]
    provenance: dict[str, Any] = Field(default_factory=dict)
    """`itune`, the version that wrote it, and `sources`."""

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The caption files it was made of, where `provenance` names them."""
        sources = self.provenance.get("sources")
        return [each for each in sources if isinstance(each, dict)] if isinstance(sources, list) else []

    def to_json(self) -> str:
        """The text of `datastore.json`."""
        return self.model_dump_json(indent=2) + "\n"


DATASTORE_FOLDER = ManifestFolder(
    MANIFEST,
    DatastoreManifest,
    DatastoreError,
    "copy it again, or build one with itune-datastore build",
)


class Retrieved(NamedTuple):
    """A caption that a search found."""

    caption: str
    score: float
    """Inner product of the query and the entry, both of length 1 (and centred where the datastore is)."""
    image: str
    """The id of the photo that the caption belongs to."""


class Texts:
    """Strings in one memory-mapped file, each ending with a newline, and the offsets where they begin."""

    def __init__(self, text: Path, offsets: Path, count: int) -> None:
        """Map `count` strings."""
        self._offsets = _load_array(offsets, (np.int64,), (count + 1,))
        with reading(text, DatastoreError, DATASTORE_FOLDER.mend):
            self._text = np.asarray(np.memmap(text, np.uint8, "r"))
            first, last = self._offsets[[0, -1]].tolist()
            if first != 0 or last != len(self._text) or (np.diff(self._offsets) < 1).any():
                raise ValueError(f"{len(self._text)} bytes; {offsets.name} has offsets from {first} to {last}")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> str:
        start, end = self._offsets[index : index + 2]
        return bytes(self._text[start : end - 1]).decode("utf-8", errors="replace")


class Datastore:
    """A datastore on disk, open for searching; several threads may share it."""

    def __init__(self, folder: Path, manifest: DatastoreManifest) -> None:
        """Map the files of a checked manifest; `load` calls it."""
        self.folder, self.manifest = folder, manifest
        dim = manifest.encoder.dim
        floats = (np.float16, np.float32)
        self.embeddings: NDArray[Any] = _load_array(folder / EMBEDDINGS, floats, (manifest.entries, dim))
        with reading(folder / EMBEDDINGS, DatastoreError, DATASTORE_FOLDER.mend):
            if self.embeddings.nbytes <= _HASHED_BYTES and not np.isfinite(self.embeddings).all():
                raise ValueError("contains values that are not finite")
        self.entries = _load_array(folder / ENTRIES, (np.int64,), (manifest.entries, 3))
        """[entries, 3]: image, first caption, and the one after the last."""
        photos, starts, ends = self.entries.T
        with reading(folder / ENTRIES, DatastoreError, DATASTORE_FOLDER.mend):
            limits = manifest.images, manifest.captions
            if self.entries.min() < 0 or photos.max() >= limits[0] or ends.max() > limits[1] or (starts >= ends).any():
                raise ValueError(f"entries without captions, or beyond {limits[0]} images and {limits[1]} captions")
        self.captions = Texts(folder / f"{CAPTIONS}.txt", folder / f"{CAPTIONS}.npy", manifest.captions)
        self.images = Texts(folder / f"{IMAGES}.txt", folder / f"{IMAGES}.npy", manifest.images)
        self.mean: Float32 | None = None
        if manifest.centered:
            self.mean = _load_array(folder / MEAN, (np.float32,), (dim,))
        self._index: Any = None
        if manifest.index == "ivf":
            mend = f"install faiss with pip install 'itune-captioner[retrieval]', or {DATASTORE_FOLDER.mend}"
            with reading(folder / INDEX, DatastoreError, mend):
                self._index = load_ivf(folder / INDEX, (manifest.entries, dim), manifest.nprobe)

    @classmethod
    def load(cls, folder: str | Path, *, encoder: EncoderIdentity | None = None, verify: bool = False) -> Datastore:
        """Open a datastore, which must be of `encoder` if that is given.

        Sizes are always compared, and the hashes of files below 64 MB; with `verify` all hashes, which takes a second
        for each gigabyte of embeddings.

        Raises:
            DatastoreError: not a datastore, damaged, of another format or encoder, or faiss is needed and missing.
        """
        folder = Path(folder)
        manifest = DATASTORE_FOLDER.read(folder)
        needed = {EMBEDDINGS, ENTRIES} | {f"{name}.{part}" for name in (CAPTIONS, IMAGES) for part in ("txt", "npy")}
        needed |= ({MEAN} if manifest.centered else set()) | ({INDEX} if manifest.index == "ivf" else set())
        DATASTORE_FOLDER.check(folder, manifest.files, needed, inf if verify else _HASHED_BYTES)
        store = cls(folder, manifest)
        if encoder is not None:
            store.require(encoder)
        return store

    def require(self, encoder: EncoderIdentity) -> None:
        """Raise DatastoreError, naming both encoders, unless the datastore was built with `encoder`."""
        if not self.manifest.encoder.same_as(encoder):
            raise DatastoreError(
                f"{self.folder} was built with {self.manifest.encoder}, but the model uses {encoder}: build one for it "
                "with itune-datastore build --encoder"
            )

    def search(
        self,
        embeddings: Float32 | None,
        k: int,
        *,
        exclude_images: Sequence[Collection[str]] | None = None,
        exclude_captions: Sequence[Collection[str]] | None = None,
    ) -> list[list[Retrieved]]:
        """The `k` best captions for each of `embeddings` [B, D], best first.

        In a "text" datastore, the nearest captions. In an "image" datastore, the captions of the `NEIGHBOURS` nearest
        photos (more, if these have fewer than k) that agree most with the others (see `consensus`). No caption comes
        twice, ignoring case, spaces and the final period. Ties keep the order of the entries. An approximate index may
        find fewer than k.

        `exclude_images`: for each query, ids of photos whose captions are left out; `exclude_captions`: captions that
        are left out, whichever photo they belong to.

        Raises:
            DatastoreError: embeddings are missing, of another width, or not finite.
        """
        dim = self.manifest.encoder.dim
        queries = np.asarray(embeddings, np.float32)
        if queries.ndim != 2 or queries.shape[1] != dim or not np.isfinite(queries).all():
            raise DatastoreError(
                f"{self.folder}: needs finite embeddings [images, {dim}] of the model's vision graph, not "
                f"{list(queries.shape)} with {np.count_nonzero(~np.isfinite(queries))} not finite; export the model "
                "again"
            )
        ranking = Ranking(self.embeddings, centre(queries, self.mean), self._index)
        images = exclude_images or [()] * len(queries)
        captions = exclude_captions or [()] * len(queries)
        return [
            self._take(ranking, query, k, set(without), {caption_key(caption) for caption in others})
            for query, (without, others) in enumerate(zip(images, captions, strict=True))
        ]

    def _take(self, ranking: Ranking, query: int, k: int, images: set[str], taken: set[str]) -> list[Retrieved]:
        if k < 1:
            return []
        is_text = self.manifest.kind == "text"
        wanted = k if is_text else NEIGHBOURS
        count = 4 * wanted
        while True:
            entries, scores = ranking.best(query, count)
            photos = list(islice(self._captions(entries, scores, images, taken), None if is_text else wanted))
            found = _distinct(each for captions in photos for each in captions)
            # Too few may be left after exclusions and duplicates: look further.
            all_seen = len(photos) < wanted and (len(entries) < count or count >= len(self.entries))
            if all_seen or (len(found) >= k and (is_text or len(photos) >= wanted)):
                return (found if is_text else self._most_typical(photos))[:k]
            if len(photos) >= wanted:
                wanted *= 4
            count *= 4

    def _captions(
        self, entries: Int64, scores: Float32, images: set[str], taken: set[str]
    ) -> Iterator[list[Retrieved]]:
        """The captions of each entry that are neither of `images` nor the same as `taken`; no empty lists."""
        for entry, score in zip(entries.tolist(), scores.tolist(), strict=True):
            image, start, end = self.entries[entry].tolist()
            name = self.images[image]
            captions = [] if name in images else [self.captions[i] for i in range(start, end)]
            if left := [Retrieved(each, score, name) for each in captions if caption_key(each) not in taken]:
                yield left

    def _most_typical(self, photos: Iterable[list[Retrieved]]) -> list[Retrieved]:
        """The captions of some photos, sorted by how much they agree with the others."""
        captions = [each for photo in photos for each in photo]
        votes = np.exp(_SHARPNESS * np.array([each.score for each in captions]))
        agreement = consensus([_words(each.caption) for each in captions], votes, self._rarity)
        return _distinct(captions[i] for i in np.argsort(-agreement, kind="stable"))

    @cached_property
    def _rarity(self) -> NGramWeights:
        step = max(1, len(self.captions) // _SAMPLED)
        return NGramWeights(_words(self.captions[i]) for i in range(0, len(self.captions), step))


def centre(embeddings: Float32, mean: Float32 | None) -> Float32:
    """Embeddings [B, D] minus `mean`, scaled to length 1."""
    centred = embeddings if mean is None else embeddings - mean
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(norms, 1e-12), np.float32)


def caption_key(caption: str) -> str:
    """The same for captions that differ only in case, spaces and final period."""
    return " ".join(caption.split()).rstrip(" .").casefold()


def _words(caption: str) -> list[str]:
    return caption_key(caption).split()


def _distinct(captions: Iterable[Retrieved]) -> list[Retrieved]:
    """The captions without repetitions of an earlier one."""
    first: dict[str, Retrieved] = {}
    for each in captions:
        first.setdefault(caption_key(each.caption), each)
    return list(first.values())


def _load_array(path: Path, dtypes: tuple[Any, ...], shape: tuple[int, ...]) -> NDArray[Any]:
    with reading(path, DatastoreError, DATASTORE_FOLDER.mend):
        # Still mapped, but without the bookkeeping that NumPy's memmap does at every access.
        array: NDArray[Any] = np.asarray(open_memmap(path, mode="r"))
        if array.dtype not in dtypes or array.shape != shape:
            raise ValueError(f"contains {array.dtype} {array.shape} instead of {shape}")
        return array
