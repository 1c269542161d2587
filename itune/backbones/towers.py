"""What every vision tower offers, and how a source becomes one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from ..runtime.engines.base import UInt8
from ..runtime.settings import ImageSettings
from .clip import ClipTower
from .onnx_tower import OnnxTower
from .sources import BackboneError, fetch


class VisionTower(Protocol):
    """uint8 pixels [B, H, W, 3] -> visual embeddings [B, tokens, width]; `sha256` is the hash of the weight files."""

    kind: Literal["clip", "onnx"]
    folder: Path
    sha256: str
    tokens: int
    width: int
    image: ImageSettings

    def embed(self, pixels: UInt8) -> Tensor:
        """Visual embeddings float32 [B, tokens, width] of uint8 pixels [B, H, W, 3]."""
        ...


def load_vision_tower(
    source: str, revision: str | None = None, *, image: ImageSettings | None = None, device: str = "cpu"
) -> VisionTower:
    """Load a CLIP vision checkpoint or an ONNX tower (hub id, folder, or `.onnx` file).

    `image` overrides the preprocessing of the folder's `preprocessor_config.json`.
    """
    path = fetch(source, revision)
    if (path / "config.json").is_file():
        return ClipTower(path, image, device)
    graphs = [path] if path.suffix == ".onnx" else sorted(path.glob("*.onnx"))
    if len(graphs) != 1:
        raise BackboneError(
            f"{path}: has no config.json and {len(graphs)} .onnx files; give a CLIP folder or one .onnx file"
        )
    return OnnxTower(graphs[0], image)
