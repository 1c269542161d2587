"""The vision graph: uint8 pixels to the keys and values of every adapted layer, computed once per image.

Whatever the language model asks of an image later is a product with these; the tower's embeddings themselves
never leave the graph.
"""

from __future__ import annotations

import numpy as np

from ..adapter import ITuningAdapter
from ..backbones import ClipTower, OnnxTower, VisionTower
from ..model import ITuningModel
from ..retrieval import RetrievalHead
from .graph import Array, Graph
from .retrieval_output import append_embedding
from .vision_clip import append_clip
from .vision_onnx import append_onnx

PIXELS = "pixels"


def build_vision(model: ITuningModel, tower: VisionTower, head: RetrievalHead | None = None) -> Graph:
    """The graph from `pixels`, uint8 [images, H, W, 3], to `visual.{i}.keys` and `visual.{i}.values`.

    Per adapted layer i: keys float32 [images, heads, r / heads, N] (transposed, as Q K^T takes them) and values
    float32 [images, heads, N, r / heads]. With `head`, also the embedding to search a datastore with.
    """
    graph = Graph("vision")
    height, width = tower.image.output_size
    graph.input(PIXELS, np.uint8, ("images", height, width, 3))
    if isinstance(tower, ClipTower):
        embeddings = append_clip(graph, PIXELS, tower)
    else:
        assert isinstance(tower, OnnxTower)
        embeddings = append_onnx(graph, PIXELS, tower)
    _append_projections(graph, embeddings, model, tower.tokens)
    if head is not None:
        append_embedding(graph, embeddings, head)
    return graph


def projection_weights(model: ITuningModel) -> tuple[Array, Array]:
    """Equation 2 of all layers as one product: weight [d_v, layers * 2 r] and bias [layers * 2 r].

    The columns are layer after layer, the keys' before the values'.
    """
    linears = [linear for adapter in _adapters(model) for linear in (adapter.key, adapter.value)]
    weight = np.concatenate([linear.weight.detach().numpy() for linear in linears]).T
    return weight, np.concatenate([linear.bias.detach().numpy() for linear in linears])


def split_projections(weight: Array, bias: Array, layers: list[int]) -> dict[str, Array]:
    """The inverse of `projection_weights`: tensors under their checkpoint names, in Linear layout."""
    names = [f"layers.{i}.{part}" for i in layers for part in ("key", "value")]
    weights = np.split(weight, len(names), axis=1)
    biases = np.split(bias, len(names))
    tensors = {f"{name}.weight": np.ascontiguousarray(w.T) for name, w in zip(names, weights, strict=True)}
    return tensors | {f"{name}.bias": b for name, b in zip(names, biases, strict=True)}


def _append_projections(graph: Graph, embeddings: str, model: ITuningModel, tokens: int) -> None:
    heads, bottleneck = model.config.heads, model.config.bottleneck
    weight, bias = projection_weights(model)
    with graph.scope("visual"):
        product = graph.op("MatMul", embeddings, graph.initializer("visual.weight", weight))
        product = graph.op("Add", product, graph.initializer("visual.bias", bias))
        count = 2 * len(model.adapters)
        parts = graph.ops("Split", product, names=[None] * count, axis=-1, num_outputs=count)
        split = graph.constant([0, 0, heads, bottleneck // heads])
        for layer, keys, values in zip(model.adapter_layers, parts[::2], parts[1::2], strict=True):
            for part, value, perm, last in (
                ("keys", keys, (0, 2, 3, 1), (bottleneck // heads, tokens)),
                ("values", values, (0, 2, 1, 3), (tokens, bottleneck // heads)),
            ):
                value = graph.op("Reshape", value, split)
                name = graph.op("Transpose", value, perm=perm, name=f"visual.{layer}.{part}")
                graph.output(name, np.float32, ("images", heads, *last))


def _adapters(model: ITuningModel) -> list[ITuningAdapter]:
    return [adapter for adapter in model.adapters.values() if isinstance(adapter, ITuningAdapter)]
