"""Compute the embeddings that captions are retrieved by, in PyTorch, and retrieve captions for training.

The exported vision graph computes the same embeddings (`export.graph.embedding`), so a bundle can search a datastore
that was built here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from torch import Tensor

from ..backbones import ClipProjection, ClipTower, VisionTower, load_clip_projection, load_vision_tower
from ..backbones.pretrained import BackboneError, fetch, load_pretrained
from ..data.features import Features, identity
from ..data.records import Record
from ..files import write_json
from ..progress import OnProgress, silent
from ..runtime.engines.base import Float32
from ..runtime.errors import reading
from ..runtime.retrieval.datastore import Datastore
from ..runtime.settings import EncoderIdentity
from ..runtime.text import stateless
from .options import Pooling

EPSILON = 1e-12
"""Minimum of a vector's length before it divides."""
_BATCH = 64
_RETRIEVED = TypeAdapter(dict[str, list[str]])


@dataclass(frozen=True)
class RetrievalHead:
    """Pools a vision tower's embeddings into one of length 1 per image.

    "projection" is CLIP's image feature: post-layernorm of the CLS embedding, then `visual_projection`. "mean" is the
    mean over all visual embeddings, for towers without such a feature.
    """

    encoder: EncoderIdentity
    projection: ClipProjection | None = None

    @torch.inference_mode()
    def pool(self, visual: Tensor) -> Tensor:
        """Pool visual embeddings [images, N, d_v] into float32 [images, D] of length 1."""
        visual = visual.float()
        x = visual.mean(dim=1) if self.projection is None else self.projection.to(visual.device)(visual[:, 0])
        pooled: Tensor = x / x.norm(dim=1, keepdim=True).clamp(min=EPSILON)
        return pooled


def load_head(tower: VisionTower, source: str, pooling: Pooling | None = None) -> RetrievalHead:
    """Load the retrieval head of a tower that was loaded from `source`.

    `pooling` None is "projection" if the tower's folder has CLIP's projection, else "mean".

    Raises:
        BackboneError: `pooling` is "projection", but there is none.
    """
    folder = str(tower.folder)
    projection = load_clip_projection(folder) if isinstance(tower, ClipTower) and pooling != "mean" else None
    if projection is None and pooling == "projection":
        raise BackboneError(f"{source}: has no visual_projection to retrieve captions by; name a full CLIP checkpoint")
    encoder = EncoderIdentity(
        source=source,
        sha256=tower.sha256,
        pooling="mean" if projection is None else "projection",
        dim=tower.width if projection is None else len(projection.weight),
    )
    return RetrievalHead(encoder, projection)


class TextEncoder:
    """CLIP's text tower: turns captions into projected text features of length 1."""

    def __init__(self, source: str) -> None:
        """Load a full CLIP checkpoint (hub id or folder) with its tokenizer. Raises BackboneError."""
        from transformers import AutoTokenizer, CLIPModel

        folder = fetch(source)
        model = load_pretrained(CLIPModel, folder, "a full CLIP checkpoint, or build with --kind image")
        with reading(f"{folder}: tokenizer", BackboneError, "copy the model again"):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._tokenizer.padding_side = self._tokenizer.truncation_side = "right"  # as CLIP was trained
            stateless(self._tokenizer.backend_tokenizer)
            self._tokenizer("a")  # some damage is only found on use
        self.model, self._project = model.text_model.train(False), model.text_projection

    @torch.inference_mode()
    def embed(self, captions: Sequence[str]) -> Float32:
        """Return text features [captions, D]; captions are cut at CLIP's 77 tokens."""
        inputs = self._tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.model.config.max_position_embeddings,
            split_special_tokens=True,
            return_tensors="pt",
        )
        pooled = self.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
        features = self._project(pooled)
        embedded: Float32 = (features / features.norm(dim=1, keepdim=True).clamp(min=EPSILON)).numpy()
        return embedded


def load_encoder(source: str, pooling: Pooling | None = None) -> tuple[VisionTower, RetrievalHead]:
    """Load a vision tower and its retrieval head."""
    tower = load_vision_tower(source)
    return tower, load_head(tower, source, pooling)


OwnCaptions = Literal["photo", "captions"]
"""Which captions of a datastore count as a photo's own (see `retrieve_for`)."""


def retrieve_for(
    records: Sequence[Record],
    features: Features,
    datastore: Datastore,
    k: int,
    head: RetrievalHead,
    *,
    leave_out: OwnCaptions = "captions",
    cache: Path | None = None,
    progress: OnProgress = silent,
) -> dict[str, list[str]]:
    """Retrieve, for every record's id, the k captions of the datastore that are most similar to its photo.

    A photo's own captions are left out: training would copy them, and a dev split would be scored on captions that it
    was shown. `leave_out` "photo", for a dev split, leaves out the captions of the photo with the record's id and
    otherwise retrieves as the finished captioner will; "captions", for training, leaves out
    every caption equal to one of the photo's, whichever photo it belongs to. The
    folder `cache` keeps the result for the same photos, captions, datastore and k. `features` must be prepared for the
    records' photos.

    Raises:
        DatastoreError: the datastore is of another encoder than `head`.
    """
    datastore.require(head.encoder)
    path = None if cache is None else cache / f"retrieved-{_key(records, datastore, k, leave_out)}.json"
    if path is not None:
        with suppress(OSError, ValueError):  # not there yet, or damaged
            kept = _RETRIEVED.validate_json(path.read_bytes())
            if all(record.id in kept for record in records):
                return kept
    captions: dict[str, list[str]] = {}
    for start in range(0, len(records), _BATCH):
        batch = records[start : start + _BATCH]
        embeddings = head.pool(features.read([record.image for record in batch])).cpu().numpy()
        found = datastore.search(
            embeddings,
            k,
            exclude_images=[{record.id} for record in batch],
            exclude_captions=[record.captions for record in batch] if leave_out == "captions" else None,
        )
        for record, nearest in zip(batch, found, strict=True):
            captions[record.id] = [each.caption for each in nearest]
        progress(len(captions), len(records))
    if path is not None:
        write_json(path, captions, indent=None)
    return captions


def _key(records: Sequence[Record], datastore: Datastore, k: int, leave_out: str) -> str:
    digest = hashlib.sha256(f"{datastore.manifest.to_json()}\n{k} {leave_out}\n".encode())
    for record in records:
        digest.update(f"{json.dumps([record.id, identity(record.image), record.captions])}\n".encode())
    return digest.hexdigest()[:16]
