"""Vision towers: CLIP's, or any ONNX graph, with the preprocessing of their pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from ..files import hash_files
from ..runtime.engines.base import Float32, UInt8
from ..runtime.errors import reading
from ..runtime.settings import ImageSettings
from .sources import BackboneError, fetch, load_pretrained, read_config, require_weights, vision_kind, weight_files

PREPROCESSOR = "preprocessor_config.json"
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PROJECTION = {
    "weight": "visual_projection.weight",
    "norm_weight": "post_layernorm.weight",
    "norm_bias": "post_layernorm.bias",
}


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


class OnnxTower:
    """An ONNX graph from normalized pixels, float32 [B, 3, H, W], to embeddings [B, N, d_v]."""

    kind: Literal["clip", "onnx"] = "onnx"

    def __init__(self, file: Path, image: ImageSettings | None = None) -> None:
        import onnxruntime as ort

        self.file = file
        self.folder = file.parent
        self.image = image or read_image_settings(self.folder)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        # Otherwise its idle threads spin for 50 ms after a run and slow PyTorch's down.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        height, width = self.image.output_size
        with reading(file, BackboneError, f"a vision tower has one input, float32 pixels [B, 3, {height}, {width}]"):
            self.session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            pixels, outputs = self.session.get_inputs()[0], self.session.get_outputs()
            self._input, self._one_at_a_time = pixels.name, isinstance(pixels.shape[0], int)
            self._output = next((o for o in outputs if o.name == "last_hidden_state"), outputs[0]).name
            probe = self.embed(np.zeros((1, height, width, 3), np.uint8))
        if probe.ndim != 3:
            raise BackboneError(f"{file}: {self._output} has shape {list(probe.shape)}; embeddings are [B, N, width]")
        self.tokens, self.width = probe.shape[1:]
        self.sha256 = hash_files([file, *self.folder.glob(f"{file.name}.data*")])

    def embed(self, pixels: UInt8) -> Tensor:
        """Visual embeddings float32 [B, tokens, width] of uint8 pixels [B, H, W, 3]."""
        x = normalize(pixels, self.image)
        batches = np.split(x, len(x)) if self._one_at_a_time else [x]
        embedded = [self.session.run([self._output], {self._input: batch})[0] for batch in batches]
        return torch.from_numpy(np.concatenate(embedded))


def read_image_settings(folder: Path) -> ImageSettings:
    """The settings of a Hugging Face `preprocessor_config.json`.

    Raises:
        BackboneError: the file is missing or damaged, or describes preprocessing that we do not reproduce.
    """
    path = folder / PREPROCESSOR
    with reading(path, BackboneError, "a vision tower needs an image preprocessor's configuration"):
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        size = config["size"] if isinstance(config["size"], dict) else {"shortest_edge": config["size"]}
        supported = {
            "do_resize": config.get("do_resize", True),
            "do_normalize": config.get("do_normalize", True),
            "do_rescale": config.get("do_rescale", True),
            "rescale_factor": abs(255 * config.get("rescale_factor", 1 / 255) - 1) < 1e-4,
            "size.longest_edge": "longest_edge" not in size,
        }
        if unsupported := [field for field, supports in supported.items() if not supports]:
            raise BackboneError(
                f"{path}: {unsupported[0]} is not supported: pixels are resized to a shorter edge or to height and "
                "width, rescaled by 1/255 and normalized"
            )
        edge = size.get("shortest_edge")
        crop = config.get("crop_size") if config.get("do_center_crop", True) else None
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        return ImageSettings(
            size=(edge, edge) if edge else (size["height"], size["width"]),
            resize="shortest_edge" if edge else "squash",
            crop=(crop["height"], crop["width"]) if crop else None,
            mean=config["image_mean"],
            std=config["image_std"],
            interpolation=_RESAMPLE[config.get("resample", 3)],  # type: ignore[arg-type]
        )


def normalize(pixels: UInt8, image: ImageSettings) -> Float32:
    """(pixels / 255 - mean) / std of uint8 [B, H, W, 3], as contiguous float32 [B, 3, H, W]."""
    scale = 1 / (255 * np.array(image.std))
    shift = -np.array(image.mean) / np.array(image.std)
    x = pixels * scale.astype(np.float32) + shift.astype(np.float32)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
