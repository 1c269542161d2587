"""The vision graph's output that searches a datastore, and the check that it equals PyTorch's embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from ...backbones import VisionTower
from ...retrieval.encoder import RetrievalHead
from ...runtime.bundle import Bundle
from ...runtime.engines.base import Float32, UInt8
from ...runtime.engines.onnxruntime import available_cpus, open_session
from ...runtime.graph_names import EMBEDDING
from ..options import Precision
from ..verify.limits import LIMITS
from ..verify.report import Check
from .builder import Array, Graph
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


def clip_projection(weights: Mapping[str, Array]) -> dict[str, Array]:
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


@dataclass(frozen=True)
class EmbeddingReference:
    """PyTorch's embeddings of some images, to compare the exported output with."""

    pixels: UInt8
    embeddings: Float32

    @classmethod
    def record(cls, tower: VisionTower, head: RetrievalHead, pixels: UInt8) -> Self:
        """Embed `pixels` [images, H, W, 3]."""
        return cls(pixels, head.pool(tower.embed(pixels)).cpu().numpy())

    def check(self, bundle: Path, precision: Precision) -> Check:
        """A line of the verification's report: the largest distance between two vectors of length 1."""
        vision = Bundle.load(bundle, verify=False).graph("vision", "onnxruntime")
        session = open_session(bundle / vision.file, available_cpus())
        found = np.asarray(session.run([EMBEDDING], {vision.inputs[0].name: self.pixels})[0])
        difference = np.linalg.norm(found - self.embeddings, axis=1)
        limit, worst = LIMITS[precision].outputs, float(difference.max())
        largest = float(np.abs(found - self.embeddings).max())
        return Check(EMBEDDING, f"image {difference.argmax()}", largest, worst, limit, worst <= limit)
