"""Compare the output that searches a datastore with PyTorch's embedding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from ...backbones import VisionTower
from ...retrieval.encoder import RetrievalHead
from ...runtime.bundle import Bundle
from ...runtime.cpus import available_cpus
from ...runtime.engines.base import Float32, UInt8
from ...runtime.engines.onnxruntime import open_session
from ...runtime.graph_names import EMBEDDING
from ..options import Precision
from .limits import LIMITS
from .report import Check


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
        """Check the largest distance between the embeddings of the graph and of PyTorch, both of length 1."""
        vision = Bundle.load(bundle, verify=False).graph("vision", "onnxruntime")
        session = open_session(bundle / vision.file, available_cpus())
        found = np.asarray(session.run([EMBEDDING], {vision.inputs[0].name: self.pixels})[0])
        difference = np.linalg.norm(found - self.embeddings, axis=1)
        limit, worst = LIMITS[precision].outputs, float(difference.max())
        largest = float(np.abs(found - self.embeddings).max())
        return Check(EMBEDDING, f"image {difference.argmax()}", largest, worst, limit, worst <= limit)
