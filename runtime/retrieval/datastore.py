"""The datastore: captions that can be found by an image's embedding, in a folder described by its `datastore.json`.

An entry is a caption with its text embedding (kind "text": image-to-text retrieval, as SmallCap does), or a photo's
embedding with all its captions (kind "image": image-to-image). Everything but the manifest is memory-mapped. Like a
bundle, a datastore comes from anywhere, and nothing in it is believed: see `manifest.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ..engines.base import Float32, Int64
from ..errors import DatastoreError
from ..manifest import FileHash, FileName, ManifestFolder, Positive
from ..settings import EncoderIdentity, Settings
from .consensus import NGramWeights, consensus
from .nearest import FlatRanking, IvfRanking, Ranking, load_ivf

FORMAT: Literal[1] = 1
MANIFEST = "datastore.json"
EMBEDDINGS, MEAN, ENTRIES, INDEX = "embeddings.npy", "mean.npy", "entries.npy", "index.faiss"
CAPTIONS, IMAGES = "captions", "images"
NEIGHBOURS = 20
"""The photos of an "image" datastore among whose captions is chosen; more where these have too few."""
_SHARPNESS = 5.0
"""A photo votes with exp of so many times its similarity, in deciding which captions are typical."""
_SAMPLED = 2000  # captions that tell which words are common
_HASHED_BYTES = 64 << 20


class DatastoreManifest(Settings):
    """The content of `datastore.json`."""

    format: Literal[1] = FORMAT
    kind: Literal["text", "image"]
    """What was embedded: captions, or photos."""
    encoder: EncoderIdentity
    entries: Positive
    captions: Positive
    images: Positive
    index: Literal["flat", "ivf"]
    """How it is searched: exactly, or through faiss's inverted lists."""
    nprobe: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    """Inverted lists that a query looks through; 0 where there are none."""
    centered: bool
    """Whether the mean of the embeddings (`mean.npy`) was subtracted from entries, and has to be from queries."""
    files: dict[FileName, FileHash]
    provenance: dict[str, Any] = Field(default_factory=dict)
    """`itune`, the version that wrote it, and `sources`."""

    @model_validator(mode="after")
    def _all_files(self) -> DatastoreManifest:
        needed = {EMBEDDINGS, ENTRIES} | {f"{name}.{part}" for name in (CAPTIONS, IMAGES) for part in ("txt", "npy")}
        needed |= ({MEAN} if self.centered else set()) | ({INDEX} if self.index == "ivf" else set())
        if missing := sorted(needed - self.files.keys()):
            raise ValueError(f"files: {missing[0]} is not listed")
        if (self.index == "ivf") != (self.nprobe > 0):
            raise ValueError(
                f"index {self.index} and nprobe {self.nprobe}: inverted lists are looked through, and only they"
            )
        return self

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The caption files that it was made of, as far as its maker has told."""
        sources = self.provenance.get("sources")
        return [each for each in sources if isinstance(each, dict)] if isinstance(sources, list) else []

    def to_json(self) -> str:
        """The text of `datastore.json`."""
        return self.model_dump_json(indent=2) + "\n"


STORE = ManifestFolder(
    noun="datastore",
    manifest=MANIFEST,
    model=DatastoreManifest,
    version_field="format",
    version=FORMAT,
    error=DatastoreError,
    maker="itune-datastore build",
    rebuild="build the datastore again",
)


class Retrieved(NamedTuple):
    """A caption that was found."""

    caption: str
    score: float
    """Inner product of the query and the entry, both of length 1 (and centred where the datastore is): of an "image"
    datastore, how similar the photo is."""
    image: str
    """The id of the photo that the caption is of."""


class Texts:
    """Strings in one memory-mapped file, each ending with a newline, and where each begins."""

    def __init__(self, text: Path, offsets: Path) -> None:
        self._offsets = _load_array(offsets, np.int64, 1)
        size = text.stat().st_size
        if not size or self._offsets[0] != 0 or self._offsets[-1] != size or (np.diff(self._offsets) < 1).any():
            raise DatastoreError(f"{offsets} does not fit {text.name}; {STORE.mend}")
        self._text = np.asarray(np.memmap(text, np.uint8, "r"))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self._offsets[index : index + 2]
        return bytes(self._text[start : end - 1]).decode("utf-8", errors="replace")


class Datastore:
    """A datastore on disk, open for searching; several threads may share it."""

    def __init__(self, folder: Path, manifest: DatastoreManifest) -> None:
        """Map the files of a manifest that was read and checked; `load` does that."""
        self.folder, self.manifest = folder, manifest
        self.embeddings: NDArray[Any] = _load_array(folder / EMBEDDINGS, (np.float16, np.float32), 2)
        self.entries = _load_array(folder / ENTRIES, np.int64, 2)
        """[entries, 3]: image, first caption, and the one after the last."""
        self.captions = Texts(folder / f"{CAPTIONS}.txt", folder / f"{CAPTIONS}.npy")
        self.images = Texts(folder / f"{IMAGES}.txt", folder / f"{IMAGES}.npy")
        mean = _load_array(folder / MEAN, np.float32, 1) if manifest.centered else None
        self.mean: Float32 | None = None if mean is None else np.asarray(mean)
        shapes = {
            EMBEDDINGS: (self.embeddings.shape, (manifest.entries, manifest.encoder.dim)),
            ENTRIES: (self.entries.shape, (manifest.entries, 3)),
            CAPTIONS: ((len(self.captions),), (manifest.captions,)),
            IMAGES: ((len(self.images),), (manifest.images,)),
            MEAN: (() if self.mean is None else self.mean.shape, (manifest.encoder.dim,) if manifest.centered else ()),
        }
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise DatastoreError(f"{folder}: {name} has shape {found} instead of {expected}; {STORE.mend}")
        most, lengths = self.entries.max(axis=0), self.entries[:, 2] - self.entries[:, 1]
        outside = self.entries.min() < 0 or most[0] >= manifest.images or most[1:].max() > manifest.captions
        if outside or lengths.min() < 1 or lengths.sum() > manifest.captions:  # a caption is of one entry
            raise DatastoreError(f"{folder / ENTRIES}: names captions or photos that are not there; {STORE.mend}")
        self._index = (
            load_ivf(folder / INDEX, manifest.entries, manifest.encoder.dim, manifest.nprobe)
            if manifest.index == "ivf"
            else None
        )

    @classmethod
    def load(
        cls, folder: str | Path, *, encoder: EncoderIdentity | None = None, verify: bool | None = None
    ) -> Datastore:
        """Open a datastore, which has to be one of `encoder`'s if that is given.

        Sizes are always compared; hashes of all files with `verify`, of none without, and by default of those below
        64 MB, since a gigabyte of embeddings takes a second.

        Raises:
            DatastoreError: not a datastore, damaged, of another format or encoder, or faiss is needed and missing.
        """
        folder = Path(folder)
        manifest = STORE.read(folder)
        if encoder is not None:
            _require(folder, manifest, encoder)
        for name, expected in manifest.files.items():
            hashed = expected.bytes < _HASHED_BYTES if verify is None else verify
            STORE.check(folder, name, expected, verify=hashed)
        return cls(folder, manifest)

    def require(self, encoder: EncoderIdentity) -> None:
        """Raise DatastoreError, naming both, unless the datastore was built with `encoder`."""
        _require(self.folder, self.manifest, encoder)

    def search(
        self,
        embeddings: Float32,
        k: int,
        *,
        exclude_images: Sequence[Collection[str]] | None = None,
        exclude_captions: Sequence[Collection[str]] | None = None,
    ) -> list[list[Retrieved]]:
        """The `k` best captions for each of `embeddings` [B, D], best first.

        Of a "text" datastore, those that are nearest. Of an "image" datastore, those captions of the `NEIGHBOURS`
        nearest photos (of more, where these have fewer than k) that agree most with the others (see `consensus`). No
        caption comes twice, whatever its case, spaces and final period. Ties stand in order of the entry. An
        approximate index may find fewer than k.

        `exclude_images`: for each query, ids of photos whose captions are left out; `exclude_captions`: captions that
        are, however often and of whatever photo they are in the datastore.

        Raises:
            DatastoreError: embeddings of another width, or that are not numbers.
        """
        ranking = self._rank(embeddings)
        images = exclude_images or [()] * len(embeddings)
        captions = exclude_captions or [()] * len(embeddings)
        return [
            self._take(ranking, query, k, set(without), {caption_key(caption) for caption in others})
            for query, (without, others) in enumerate(zip(images, captions, strict=True))
        ]

    def _rank(self, embeddings: Float32) -> Ranking:
        queries = np.asarray(embeddings, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.manifest.encoder.dim:
            raise DatastoreError(
                f"{self.folder}: takes embeddings [images, {self.manifest.encoder.dim}], not {list(queries.shape)}"
            )
        if not np.isfinite(queries).all():
            raise DatastoreError(f"{self.folder}: an embedding to search for holds numbers that are not finite")
        queries = centre(queries, self.mean)
        if self._index is not None:
            return IvfRanking(self._index, self.embeddings, queries)
        return FlatRanking(self.embeddings, queries)

    def _take(self, ranking: Ranking, query: int, k: int, images: set[str], taken: set[str]) -> list[Retrieved]:
        if k < 1:
            return []
        is_text = self.manifest.kind == "text"
        wanted = k if is_text else NEIGHBOURS
        count = 4 * wanted
        while True:
            entries, scores = ranking.best(query, count)
            photos = self._captions(entries, scores, len(entries) if is_text else wanted, images, taken)
            found = _distinct(each for captions in photos for each in captions)
            # Those left out, and the ones that say the same, may leave too few: look further.
            all_seen = len(photos) < wanted and (len(entries) < count or count >= len(self.entries))
            if all_seen or (len(found) >= k and (is_text or len(photos) >= wanted)):
                return (found if is_text else self._most_typical(photos))[:k]
            if len(photos) >= wanted:
                wanted *= 4
            count *= 4

    def _captions(
        self, entries: Int64, scores: Float32, most: int, images: set[str], taken: set[str]
    ) -> list[list[Retrieved]]:
        """The captions of the first `most` entries that have some left: not of `images`, not saying what is `taken`."""
        found = []
        for entry, score in zip(entries.tolist(), scores.tolist(), strict=True):
            image, start, end = self.entries[entry].tolist()
            name = self.images[image]
            captions = [] if name in images else [self.captions[i] for i in range(start, end)]
            if left := [Retrieved(each, score, name) for each in captions if caption_key(each) not in taken]:
                found.append(left)
            if len(found) == most:
                break
        return found

    def _most_typical(self, photos: Iterable[list[Retrieved]]) -> list[Retrieved]:
        """The captions of some photos, those first that agree most with the others."""
        captions = [each for those in photos for each in those]
        votes = np.exp(_SHARPNESS * np.array([each.score for each in captions]))
        agreement = consensus([_words(each.caption) for each in captions], votes, self._rarity)
        return _distinct(captions[i] for i in np.argsort(-agreement, kind="stable"))

    @cached_property
    def _rarity(self) -> NGramWeights:
        step = max(1, len(self.captions) // _SAMPLED)
        return NGramWeights(_words(self.captions[i]) for i in range(0, len(self.captions), step))


def centre(embeddings: Float32, mean: Float32 | None) -> Float32:
    """Embeddings [B, D], less `mean` where there is one, at length 1."""
    centred = embeddings if mean is None else embeddings - mean
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(norms, 1e-12), np.float32)


def caption_key(caption: str) -> str:
    """What captions that say the same have in common: not case, spaces and final period."""
    return " ".join(caption.split()).rstrip(" .").casefold()


def _words(caption: str) -> list[str]:
    return caption_key(caption).split()


def _require(folder: Path, manifest: DatastoreManifest, encoder: EncoderIdentity) -> None:
    if not manifest.encoder.same_as(encoder):
        raise DatastoreError(
            f"{folder}: was built with {manifest.encoder}, but the model's embeddings come from {encoder}; build one "
            "for it with itune-datastore build --encoder"
        )


def _distinct(captions: Iterable[Retrieved]) -> list[Retrieved]:
    """Without those that say what an earlier one does."""
    first: dict[str, Retrieved] = {}
    for each in captions:
        first.setdefault(caption_key(each.caption), each)
    return list(first.values())


def _load_array(path: Path, dtype: Any, ndim: int) -> NDArray[Any]:
    try:
        # Still mapped, but without the bookkeeping that NumPy's memmap does at every access.
        array: NDArray[Any] = np.asarray(open_memmap(path, mode="r"))
    except Exception as error:  # of a header that is none NumPy raises much: ValueError, TokenError, OverflowError...
        raise DatastoreError(f"{path} is not a NumPy array ({str(error)[:120]}); {STORE.mend}") from None
    if array.dtype not in (dtype if isinstance(dtype, tuple) else (dtype,)) or array.ndim != ndim or not len(array):
        raise DatastoreError(f"{path} holds {array.dtype} {list(array.shape)}, which is not expected; {STORE.mend}")
    return array
