"""CLIP's vision tower and the projection of its CLS embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from ..files import hash_files
from ..runtime.engines.base import UInt8
from ..runtime.errors import reading
from ..runtime.settings import ImageSettings
from .preprocessing import PREPROCESSOR, normalize, read_image_settings
from .sources import BackboneError, fetch, load_pretrained, read_config, require_weights, vision_kind, weight_files

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PROJECTION = {
    "weight": "visual_projection.weight",
    "norm_weight": "post_layernorm.weight",
    "norm_bias": "post_layernorm.bias",
}


class ClipTower:
    """CLIP's vision transformer; V = its `last_hidden_state` (CLS and patches, no post-layernorm)."""

    kind: Literal["clip", "onnx"] = "clip"

    def __init__(self, folder: Path, image: ImageSettings | None = None, device: str = "cpu") -> None:
        config = read_config(folder, "clip", "clip_vision_model")
        config = config.get("vision_config", config)
        self.folder = folder
        self.sha256 = hash_files(weight_files(folder))
        model, missing = load_pretrained(CLIPVisionModel, folder, "a CLIP vision model")
        require_weights(folder, [name for name in missing if "post_layernorm." not in name])  # not part of V
        self.model = model.requires_grad_(False).to(device)
        side, patch = int(config.get("image_size", 224)), int(config.get("patch_size", 32))
        if image is None and (folder / PREPROCESSOR).is_file():
            image = read_image_settings(folder)
        self.image = image or ImageSettings(size=(side, side), crop=(side, side), mean=_MEAN, std=_STD)
        if self.image.output_size != (side, side):
            raise BackboneError(
                f"{folder}: {PREPROCESSOR} makes pixels of {self.image.output_size}, config.json wants {side} x {side}"
            )
        self.tokens = (side // patch) ** 2 + 1
        self.width = model.config.hidden_size

    @torch.no_grad()  # not inference_mode: in training, later layers need gradients
    def embed(self, pixels: UInt8) -> Tensor:
        """Visual embeddings float32 [B, tokens, width] of uint8 pixels [B, H, W, 3]."""
        x = torch.from_numpy(normalize(pixels, self.image)).to(self.model.device)
        hidden: Tensor = self.model(pixel_values=x).last_hidden_state.float()
        return hidden


class ClipProjection(nn.Module):
    """CLIP's way from the CLS embedding to the space that it shares with text: a layer norm and a product, both frozen.

    The weights are buffers: they are saved in a ClipCap checkpoint, since towers come without them, but not trained.
    """

    norm_weight: Tensor  # [d_v]
    norm_bias: Tensor  # [d_v]
    weight: Tensor  # [projected width, d_v]

    def __init__(self, width: int, projected_width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.register_buffer("norm_weight", torch.ones(width))
        self.register_buffer("norm_bias", torch.zeros(width))
        self.register_buffer("weight", torch.zeros(projected_width, width))

    def forward(self, cls: Tensor) -> Tensor:
        """Image features [images, projected width] of CLS embeddings [images, d_v]."""
        normed = F.layer_norm(cls, cls.shape[-1:], self.norm_weight, self.norm_bias, self.epsilon)
        return F.linear(normed, self.weight)


def load_clip_projection(source: str, revision: str | None = None) -> ClipProjection | None:
    """The projection of a CLIP checkpoint; None for an ONNX tower, or for a CLIP that was saved without it."""
    if vision_kind(source, revision) == "onnx":
        return None
    folder = fetch(source, revision)
    config = read_config(folder, "clip", "clip_vision_model")
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        found |= _read_tensors(path)
    tensors = {ours: t.float() for ours, end in _PROJECTION.items() for name, t in found.items() if name.endswith(end)}
    if tensors.keys() != _PROJECTION.keys():
        return None
    epsilon = float(config.get("vision_config", config).get("layer_norm_eps", 1e-5))
    projected_width, width = tensors["weight"].shape
    projection = ClipProjection(width, projected_width, epsilon)
    projection.load_state_dict(tensors)
    return projection


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The projection's tensors in a weight file."""
    ends = tuple(_PROJECTION.values())
    with reading(path, BackboneError, "copy the model again"):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.endswith(ends)}  # noqa: SIM118
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return {name: tensor for name, tensor in state.items() if name.endswith(ends)}
