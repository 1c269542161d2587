"""The exporter's methods by name, and the two graphs that they make of a captioner."""

from __future__ import annotations

import numpy as np

from ...backbones import ClipTower, OnnxTower, VisionTower
from ...methods.base import CaptionModel
from ...retrieval.encoder import RetrievalHead
from ...runtime.settings import Method
from ..graph.builder import Array, Graph
from ..graph.clip import append_clip
from ..graph.embedding import append_embedding
from ..graph.onnx_tower import append_onnx
from .base import ExportMethod
from .clipcap import CLIPCAP
from .ituning import ITUNING
from .smallcap import SMALLCAP

METHODS: dict[Method, ExportMethod] = {"i-tuning": ITUNING, "clipcap": CLIPCAP, "smallcap": SMALLCAP}


def build_vision(model: CaptionModel, tower: VisionTower, head: RetrievalHead | None = None) -> Graph:
    """The vision graph: `pixels`, uint8 [images, H, W, 3], to the method's outputs `visual.NAME`.

    With `head`, also to the embedding that searches a datastore. The tower's own embeddings never leave the graph.
    """
    graph = Graph("vision")
    pixels = graph.input("pixels", np.uint8, ("images", *tower.image.output_size, 3))
    if isinstance(tower, ClipTower):
        embeddings = append_clip(graph, pixels, tower)
    else:
        assert isinstance(tower, OnnxTower)
        embeddings = append_onnx(graph, pixels, tower)
    METHODS[model.method].append_visual(graph, embeddings, model, tower.tokens)
    if head is not None:
        append_embedding(graph, embeddings, head)
    return graph


def build_decoder(model: CaptionModel, vocabulary: Array | None = None, *, fused: bool = False) -> Graph:
    """The decoder graph of a model; a `fused` one runs on ONNX Runtime only.

    `vocabulary`, ascending int64 [V], are the only tokens that the decoder can read and write: embedding and head keep
    only their rows, while token ids stay those of the whole vocabulary. Any other token stops the runtime.

    Raises:
        ItuneError: the language model's activation function cannot be exported, or a weight is NaN or infinite.
    """
    return METHODS[model.method].decoder(model, vocabulary, fused).build()
