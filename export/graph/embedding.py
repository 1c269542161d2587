"""One more output of the vision graph: the embedding that a datastore is searched with (`itune.retrieval.encoder`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from ...backbones import VisionTower
from ...retrieval.encoder import EPSILON, RetrievalHead
from ...runtime.bundle import Bundle
from ...runtime.engines.base import EMBEDDING, Float32, UInt8
from ...runtime.engines.onnxruntime import available_cpus, open_session
from ..methods.merge import Weights
from ..quantize.rewrite import Precision
from ..verify.limits import LIMITS
from ..verify.report import Check
from .builder import Array, Graph

PREFIX = "retrieval."


def append_embedding(graph: Graph, visual: str, head: RetrievalHead) -> str:
    """Append the head to a tower's embeddings `visual` [images, N, d_v]: the output `EMBEDDING` [images, D]."""
    with graph.scope("retrieval"):
        projection = head.projection
        if projection is None:
            x = graph.op("ReduceMean", visual, graph.constant([1]), keepdims=0)
        else:
            x = graph.op("Gather", visual, graph.constant(0), axis=1)
            scale = graph.initializer(PREFIX + "post_layernorm.weight", projection.norm_weight.numpy())
            shift = graph.initializer(PREFIX + "post_layernorm.bias", projection.norm_bias.numpy())
            x = graph.op("LayerNormalization", x, scale, shift, epsilon=projection.epsilon)
            x = graph.op("MatMul", x, graph.initializer(PREFIX + "visual_projection", projection.weight.T.numpy()))
        length = graph.op("ReduceL2", x, graph.constant([1]), keepdims=1)
        length = graph.op("Max", length, graph.constant(EPSILON, np.float32))
        graph.op("Div", x, length, name=EMBEDDING)
    return graph.output(EMBEDDING, np.float32, ("images", head.encoder.dim))


def projection_weights(weights: Weights) -> dict[str, Array]:
    """What of a CLIP tower, under transformers' names, a vision graph has for the embedding; nothing of a mean's."""
    if PREFIX + "visual_projection" not in weights:
        return {}
    norm = {f"vision_model.post_layernorm.{part}": f"{PREFIX}post_layernorm.{part}" for part in ("weight", "bias")}
    return {
        **{name: weights[own] for name, own in norm.items()},
        "visual_projection.weight": weights[PREFIX + "visual_projection"].T,
    }


@dataclass(frozen=True)
class EmbeddingReference:
    """What eager PyTorch makes of some images, to hold the exported output to."""

    pixels: UInt8
    embeddings: Float32

    @classmethod
    def record(cls, tower: VisionTower, head: RetrievalHead, pixels: UInt8) -> Self:
        """Embed `pixels` [images, H, W, 3]."""
        return cls(pixels, head.pool(tower.embed(pixels)).cpu().numpy())

    def check(self, bundle: Path, precision: Precision) -> Check:
        """The line of the verification's report: the largest distance, whose scale is that of vectors of length 1."""
        vision = Bundle.load(bundle, verify=False).graph("vision", "onnxruntime")
        session = open_session(bundle / vision.file, available_cpus())
        found = np.asarray(session.run([EMBEDDING], {vision.inputs[0].name: self.pixels})[0])
        difference = np.linalg.norm(found - self.embeddings, axis=1)
        limit, worst = LIMITS[precision].outputs, float(difference.max())
        largest = float(np.abs(found - self.embeddings).max())
        return Check(EMBEDDING, f"image {difference.argmax()}", largest, worst, limit, worst <= limit)
