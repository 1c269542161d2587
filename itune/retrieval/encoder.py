"""Embeddings that captions are retrieved by, in PyTorch, and the captions retrieved for training.

The exported vision graph computes the same embeddings (`export.retrieval_output`), so a datastore that was built here
is searched there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ..backbones import (
    BackboneError,
    ClipProjection,
    ClipTower,
    VisionTower,
    fetch,
    load_clip_projection,
    load_pretrained,
    load_vision_tower,
)
from ..data.features import Features, identity
from ..data.records import Record
from ..files import atomic_path
from ..runtime.engines.base import Bool, Candidates, Float32, Int64, UInt8
from ..runtime.errors import reading
from ..runtime.retrieval.datastore import Datastore
from ..runtime.settings import EncoderIdentity

Progress = Callable[[int, int], None]
"""Told (done, in all)."""
EPSILON = 1e-12
"""What a vector's length is at least, before it divides."""
_BATCH = 64
_RETRIEVED = TypeAdapter(dict[str, list[str]])


@dataclass(frozen=True)
class RetrievalHead:
    """From a vision tower's embeddings to one of length 1 for an image.

    "projection" is CLIP's image feature: post-layernorm of the CLS embedding, then `visual_projection`. "mean" is the
    mean over all visual embeddings, for towers that were trained without such a feature.
    """

    encoder: EncoderIdentity
    projection: ClipProjection | None = None

    @torch.inference_mode()
    def pool(self, visual: Tensor) -> Tensor:
        """Embeddings float32 [images, D] of length 1, of visual embeddings [images, N, d_v]."""
        visual = visual.float()
        x = visual.mean(dim=1) if self.projection is None else self.projection.to(visual.device)(visual[:, 0])
        pooled: Tensor = x / x.norm(dim=1, keepdim=True).clamp(min=EPSILON)
        return pooled


def load_head(tower: VisionTower, source: str, pooling: Literal["mean", "projection"] | None = None) -> RetrievalHead:
    """The retrieval head of a tower that was loaded from `source`.

    `pooling` None is "projection" where the tower's folder has CLIP's projection, else "mean".

    Raises:
        BackboneError: there is no projection, and it is asked for.
    """
    folder = str(tower.folder)
    projection = load_clip_projection(folder) if isinstance(tower, ClipTower) and pooling != "mean" else None
    if projection is None and pooling == "projection":
        raise BackboneError(
            f"{source}: has no visual_projection, by which captions are found: give a full CLIP checkpoint"
        )
    encoder = EncoderIdentity(
        source=source,
        sha256=tower.sha256,
        pooling="mean" if projection is None else "projection",
        dim=tower.width if projection is None else len(projection.weight),
    )
    return RetrievalHead(encoder, projection)


class EmbeddingEngine:
    """An eager engine whose states also have the embedding that a datastore is searched with (see `State`)."""

    def __init__(self, engine: Any, head: RetrievalHead) -> None:
        """`engine` has a `tower` and `encode_features`, as `EagerEngine`."""
        self.engine, self.head = engine, head

    @property
    def most_candidates(self) -> int:
        """See `Engine.most_candidates`."""
        return int(self.engine.most_candidates)

    def encode(self, pixels: UInt8) -> Any:
        """See `Engine.encode`."""
        return self.encode_features(self.engine.tower.embed(pixels))

    def encode_features(self, visual: Tensor) -> Any:
        """Visual embeddings [images, N, d_v] to a state."""
        state = self.engine.encode_features(visual)
        state.embedding = self.head.pool(visual).cpu().numpy()
        return state

    def step(self, tokens: Int64, parents: Int64, state: Any, k: int, *, mask: Bool | None = None) -> Candidates:
        """See `Engine.step`."""
        found: Candidates = self.engine.step(tokens, parents, state, k, mask=mask)
        return found


class TextEncoder:
    """CLIP's text tower: captions to projected text features of length 1."""

    def __init__(self, source: str, revision: str | None = None) -> None:
        """Load a full CLIP checkpoint (hub id or folder) with its tokenizer. Raises BackboneError."""
        from transformers import AutoTokenizer, CLIPModel

        folder = fetch(source, revision)
        model, missing = load_pretrained(CLIPModel, folder, "a CLIP with a text tower")
        if lacks := [name for name in missing if name.startswith("text_")]:
            raise BackboneError(
                f"{folder}: has no text tower ({lacks[0]} is missing); give a full CLIP checkpoint, or build by images "
                "with --kind image"
            )
        with reading(f"{folder}: tokenizer", BackboneError, "copy the model again"):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._tokenizer("a")  # some damage is only found on use
        self.model, self._project = model.text_model.train(False), model.text_projection

    @torch.inference_mode()
    def embed(self, captions: Sequence[str]) -> Float32:
        """Text features [captions, D]; what is over CLIP's 77 tokens is cut."""
        inputs = self._tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.model.config.max_position_embeddings,
            return_tensors="pt",
        )
        pooled = self.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
        features = self._project(pooled)
        embedded: Float32 = (features / features.norm(dim=1, keepdim=True).clamp(min=EPSILON)).numpy()
        return embedded


def load_encoder(
    source: str, revision: str | None = None, pooling: Literal["mean", "projection"] | None = None
) -> tuple[VisionTower, RetrievalHead]:
    """A vision tower and its retrieval head."""
    tower = load_vision_tower(source, revision)
    return tower, load_head(tower, source, pooling)


def embed_photos(
    head: RetrievalHead, features: Features, images: Sequence[Path], progress: Progress | None = None
) -> Float32:
    """Embeddings [images, D] of photos whose visual embeddings `features` can read."""
    rows = np.empty((len(images), head.encoder.dim), np.float32)
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        rows[start : start + len(batch)] = head.pool(features.read(batch)).cpu().numpy()
        if progress:
            progress(start + len(batch), len(images))
    return rows


class Own(StrEnum):
    """What counts as a photo's own captions, in a datastore."""

    PHOTO = "photo"
    """Those of the photo with its id: of a dev split, which otherwise retrieves as the finished captioner will."""
    CAPTIONS = "captions"
    """Those, and whatever says the same, under any id: in training."""


def retrieve_for(
    records: Sequence[Record],
    features: Features,
    datastore: Datastore,
    k: int,
    head: RetrievalHead,
    *,
    leave_out: Own = Own.CAPTIONS,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, list[str]]:
    """For every record's id, the k captions of the datastore that are most similar to its photo.

    The photo's own captions are left out: else training would copy them, and a dev split's score would be of captions
    that were shown. With `cache`, a folder, the result is kept there and read again for the same photos, captions,
    datastore and k. `features` have been prepared with the records' photos.

    Raises:
        DatastoreError: the datastore is of another encoder than `head`.
    """
    # Opened before, perhaps for no encoder in particular.
    datastore.require(head.encoder)
    path = None if cache is None else cache / f"retrieved-{_key(records, datastore, k, leave_out)}.json"
    if path is not None and (kept := _read_retrieved(path, records)) is not None:
        return kept
    captions: dict[str, list[str]] = {}
    for start in range(0, len(records), _BATCH):
        batch = records[start : start + _BATCH]
        embeddings = head.pool(features.read([record.image for record in batch])).cpu().numpy()
        found = datastore.search(
            embeddings,
            k,
            exclude_images=[{record.id} for record in batch],
            exclude_captions=[record.captions for record in batch] if leave_out is Own.CAPTIONS else None,
        )
        for record, nearest in zip(batch, found, strict=True):
            captions[record.id] = [each.caption for each in nearest]
        if progress:
            progress(len(captions), len(records))
    if path is not None:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
    return captions


def _read_retrieved(path: Path, records: Sequence[Record]) -> dict[str, list[str]] | None:
    """What an earlier call kept; None where there is nothing, or nothing that can be read."""
    try:
        content = _RETRIEVED.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return content if all(record.id in content for record in records) else None


def _key(records: Sequence[Record], datastore: Datastore, k: int, leave_out: Own) -> str:
    digest = hashlib.sha256(f"{datastore.manifest.to_json()}\n{k} {leave_out}\n".encode())
    for record in records:
        digest.update(f"{json.dumps([record.id, identity(record.image), record.captions])}\n".encode())
    return digest.hexdigest()[:16]
