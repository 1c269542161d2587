"""The graphs of every captioning method: how to build them, and how to take them apart again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...backbones import ClipTower, OnnxTower, VisionTower
from ...methods.base import CaptionModel
from ...retrieval.encoder import RetrievalHead
from ...runtime.bundle import DecoderSettings
from ...runtime.settings import Method
from ..graph.builder import Array, Graph, Weights
from ..graph.clip import append_clip
from ..graph.decoder import Decoder
from ..graph.embedding import append_embedding
from ..graph.onnx_tower import append_onnx
from . import clipcap, ituning, smallcap
from .visual_attention import append_projections, split_projections


@dataclass(frozen=True)
class ExportMethod:
    """A method's part of the graphs. `model` is the method's CaptionModel."""

    append_visual: Callable[[Graph, str, Any, int], None]
    """(graph, embeddings, model, N): append the outputs `visual.NAME` to embeddings [images, N, d_v]."""
    decoder: Callable[[Any, Array | None, bool], Decoder]
    """(model, vocabulary, fused): the decoder's builder."""
    settings: Callable[[Any], dict[str, Any]]
    """(model): the manifest's fields `decoder.*` about attention to the image."""
    split_decoder: Callable[[DecoderSettings, Weights], tuple[dict[str, Array], dict[str, Array]]]
    """(settings, weights): the weights of the language model and of the adapters, under their own names."""
    split_vision: Callable[[DecoderSettings, Weights], dict[str, Array]]
    """(settings, weights): the adapters' weights in a vision graph, under their checkpoint names."""


METHODS: dict[Method, ExportMethod] = {
    "i-tuning": ExportMethod(
        append_projections, ituning.ITuningDecoder, ituning.settings, ituning.unmerge, split_projections
    ),
    "smallcap": ExportMethod(
        append_projections,
        smallcap.SmallCapDecoder,
        smallcap.settings,
        smallcap.unfold_cross_attention,
        split_projections,
    ),
    "clipcap": ExportMethod(
        append_visual=clipcap.append_mapper,
        decoder=clipcap.ClipCapDecoder,
        settings=lambda _model: clipcap.SETTINGS,
        split_decoder=lambda _settings, weights: (dict(weights), {}),
        split_vision=lambda _settings, weights: clipcap.unfold_mapper(weights),
    ),
}


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
