"""The vision graph: uint8 pixels to what the language model is given of an image, computed once per image.

The tower's embeddings themselves never leave the graph.
"""

from __future__ import annotations

import numpy as np

from ...backbones import ClipTower, OnnxTower, VisionTower
from .builder import Graph
from .clip import append_clip
from .onnx_tower import append_onnx

PIXELS = "pixels"


def append_tower(graph: Graph, tower: VisionTower) -> str:
    """Declare `pixels`, uint8 [images, H, W, 3], and append the tower; returns its embeddings [images, N, d_v]."""
    height, width = tower.image.output_size
    graph.input(PIXELS, np.uint8, ("images", height, width, 3))
    if isinstance(tower, ClipTower):
        return append_clip(graph, PIXELS, tower)
    assert isinstance(tower, OnnxTower)
    return append_onnx(graph, PIXELS, tower)
