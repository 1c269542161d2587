"""What a captioner's method decides of an export: the two graphs, and how they are taken apart again."""

from __future__ import annotations

from typing import Any

from ...backbones import VisionTower
from ...methods.base import CaptionModel
from ...methods.clipcap.model import ClipCapModel
from ...methods.ituning.model import ITuningModel
from ...methods.smallcap.model import SmallCapModel
from ...retrieval.encoder import RetrievalHead
from ...runtime.bundle import MANIFEST, Manifest
from ...runtime.errors import BundleError
from ..graph.builder import Array, Graph
from ..graph.embedding import append_embedding
from ..graph.vision import append_tower
from .clipcap import ClipCapDecoder, append_prefix, tower_weights, unfold_mapper
from .ituning import ITuningDecoder, append_keys_values, split_projections
from .merge import Weights, unmerge
from .smallcap import SmallCapDecoder, append_cross_keys_values, unfold_cross_attention


def build_vision(model: CaptionModel, tower: VisionTower, head: RetrievalHead | None = None) -> Graph:
    """The graph from `pixels`, uint8 [images, H, W, 3], to the outputs `visual.*` that the method's module lists.

    With `head`, also to the embedding that a datastore is searched with.
    """
    graph = Graph("vision")
    embeddings = append_tower(graph, tower)
    if isinstance(model, ITuningModel):
        append_keys_values(graph, embeddings, model, tower.tokens)
    elif isinstance(model, ClipCapModel):
        append_prefix(graph, embeddings, model)
    elif isinstance(model, SmallCapModel):
        append_cross_keys_values(graph, embeddings, model, tower.tokens)
    else:
        raise TypeError(type(model))
    if head is not None:
        append_embedding(graph, embeddings, head)
    return graph


def build_decoder(model: CaptionModel, vocabulary: Array | None = None, *, fused: bool = False) -> Graph:
    """The decoder graph of a model (see `decoder`); `fused` runs on ONNX Runtime only.

    `vocabulary` int64 [V], ascending: the only tokens that it can read and write; embedding and head keep only
    their rows, while token ids stay those of the whole vocabulary. Any other token is an error when it is run.

    Raises:
        ItuneError: the language model's activation function cannot be exported, or its weights are broken.
    """
    if isinstance(model, ITuningModel):
        return ITuningDecoder(model, vocabulary, fused).build()
    if isinstance(model, ClipCapModel):
        return ClipCapDecoder(model, vocabulary, fused).build()
    if isinstance(model, SmallCapModel):
        return SmallCapDecoder(model, vocabulary, fused).build()
    raise TypeError(type(model))


def decoder_settings(model: CaptionModel) -> dict[str, Any]:
    """The fields of the manifest's `decoder` that tell how the language model attends to the image."""
    if isinstance(model, ITuningModel):
        layers, width, scale = model.adapter_layers, model.config.bottleneck, model.config.score_scale
        return _attention(layers, width, model.config.heads, scale, model.config.lambda_)
    if isinstance(model, SmallCapModel):
        shape = model.config
        return _attention(list(range(len(model.layers))), shape.width, shape.heads, shape.head_width**-0.5, None)
    return _attention([], None, None, None, None)  # ClipCap's attends to nothing but the embeddings before the caption


def _attention(
    layers: list[int], width: int | None, heads: int | None, score_scale: float | None, lambda_: float | None
) -> dict[str, Any]:
    return {
        "adapter_layers": layers,
        "bottleneck": width,
        "adapter_heads": heads,
        "lambda_": lambda_,
        "score_scale": score_scale,
    }


def split_decoder(manifest: Manifest, weights: Weights) -> tuple[dict[str, Array], dict[str, Array]]:
    """The language model's weights and the adapters', under their own names, of a decoder graph."""
    if manifest.method == "clipcap":
        return dict(weights), {}
    bottleneck, score_scale, lambda_ = (
        getattr(manifest.decoder, name) for name in ("bottleneck", "score_scale", "lambda_")
    )
    if score_scale is not None and manifest.method == "smallcap":
        return unfold_cross_attention(weights, score_scale)
    if None in (bottleneck, score_scale, lambda_):
        raise BundleError(
            f"{MANIFEST}: decoder: bottleneck, score_scale or lambda is null, without which this bundle "
            "cannot be restored: export it again"
        )
    return unmerge(weights, bottleneck=bottleneck, score_scale=score_scale, lambda_=lambda_)


def split_vision(manifest: Manifest, weights: Weights) -> dict[str, Array]:
    """The adapters' weights, under their checkpoint names, of a vision graph."""
    if manifest.method == "clipcap":
        return unfold_mapper(weights)
    return split_projections(weights["visual.weight"], weights["visual.bias"], manifest.decoder.adapter_layers)


def restored_tower_weights(adapters: Weights) -> dict[str, Array]:
    """What of a CLIP tower, under transformers' names, the adapters have and its graph has not."""
    return tower_weights(adapters)
