"""The vision graph's output that searches a datastore."""

from __future__ import annotations

import numpy as np

from ...retrieval.encoder import RetrievalHead
from ...runtime.graph_names import EMBEDDING
from .builder import Array, Graph, Weights
from .ops import normalize, pool_cls

CLIPCAP_PROJECTION = ("visual.projection.norm_weight", "visual.projection.norm_bias", "visual.projection.weight")
"""CLIP's post-layernorm and visual projection [d_v, D] in a vision graph, where ClipCap's mapper reads their output."""
PROJECTION = ("retrieval.post_layernorm.weight", "retrieval.post_layernorm.bias", "retrieval.visual_projection")
"""The same where a datastore is searched."""


def append_embedding(graph: Graph, visual: str, head: RetrievalHead) -> None:
    """Append the output `EMBEDDING` [images, D], of length 1, to a tower's embeddings `visual` [images, N, d_v]."""
    with graph.scope("retrieval"):
        clip = head.projection
        if clip is None:
            x = graph.op("ReduceMean", visual, graph.constant([1]), keepdims=0)
        else:
            for name, tensor in zip(PROJECTION, (clip.norm_weight, clip.norm_bias, clip.weight.T), strict=True):
                graph.initializer(name, tensor.numpy())
            x = pool_cls(graph, visual, PROJECTION, clip.epsilon)
        normalize(graph, x, name=EMBEDDING)
    graph.output(EMBEDDING, np.float32, ("images", head.encoder.dim))


def clip_projection(weights: Weights) -> dict[str, Array]:
    """A vision graph's CLIP projection under transformers' names; empty if the graph has none."""
    for names in (CLIPCAP_PROJECTION, PROJECTION):
        if names[0] in weights:
            norm_weight, norm_bias, projection = (weights[name] for name in names)
            return {
                "vision_model.post_layernorm.weight": norm_weight,
                "vision_model.post_layernorm.bias": norm_bias,
                "visual_projection.weight": projection.T,
            }
    return {}
