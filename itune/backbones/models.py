"""Load the frozen parts: a GPT-2 language model, and a vision tower that is CLIP's or any ONNX graph."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, GPT2LMHeadModel

from ..files import hash_files
from ..runtime.engines.base import Float32, UInt8
from ..runtime.errors import reading
from ..runtime.onnx_files import external_files
from ..runtime.settings import ImageSettings
from ..runtime.text import load_tokenizer, stateless
from .image_processor import preprocessor_file, read_image_settings
from .pretrained import BackboneError, fetch, hash_weights, load_pretrained, read_config, weight_files
from .weight_files import read_tensors

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(GPT2LMHeadModel.forward).parameters else "past_key_values"
"""Name of the key/value cache in GPT-2's forward pass; newer releases of transformers renamed it."""
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PROJECTION = {
    "weight": "visual_projection.weight",
    "norm_weight": "post_layernorm.weight",
    "norm_bias": "post_layernorm.bias",
}


ModelSettings = dict[str, str | int | float]
_GPT2_SETTINGS = (
    *("n_head", "activation_function", "layer_norm_epsilon", "tie_word_embeddings"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
)
_CLIP_SETTINGS = ("num_attention_heads", "hidden_act", "layer_norm_eps")
"""Fields of `config.json` that change a model's numbers without changing the shape of its weights."""


def vision_kind(source: str) -> Literal["clip", "onnx"]:
    """The kind of vision tower at a source."""
    return "clip" if (fetch(source) / "config.json").is_file() else "onnx"


@dataclass(frozen=True)
class LanguageModel:
    """A frozen GPT-2 with its tokenizer; `sha256` is the hash of its weight files."""

    model: GPT2LMHeadModel
    tokenizer: Tokenizer
    folder: Path
    sha256: str

    @property
    def settings(self) -> ModelSettings:
        """What else decides its numbers: fields of `config.json`, and the hash of the tokens in the order of ids."""
        vocabulary = sorted((i, token) for token, i in self.tokenizer.get_vocab().items())
        digest = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
        return _settings(self.model.config, _GPT2_SETTINGS) | {"vocabulary": digest}


def load_language_model(source: str, revision: str | None = None) -> LanguageModel:
    """Load a GPT-2-family checkpoint (hub id or folder) in float32, with its tokenizer."""
    folder = fetch(source, revision)
    read_config(folder, "gpt2")
    sha256 = hash_weights(folder)
    model = load_pretrained(GPT2LMHeadModel, folder, "a GPT-2 language model")
    if model.config.activation_function == "gelu_new":
        # The same function in one kernel: a training step takes a fifth less time and activation memory.
        blocks: Any = model.transformer.h
        for block in blocks:
            block.mlp.act = nn.GELU(approximate="tanh")
    return LanguageModel(model, _tokenizer_in(folder), folder, sha256)


def _tokenizer_in(folder: Path) -> Tokenizer:
    """The tokenizer in `tokenizer.json`, or else in GPT-2's older `vocab.json` and `merges.txt`."""
    path = folder / "tokenizer.json"
    if path.is_file():
        with reading(path, BackboneError, "copy the model again"):
            return load_tokenizer(path)
    if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise BackboneError(f"{folder} has no tokenizer: put its tokenizer.json there, or vocab.json and merges.txt")
    from transformers import GPT2Tokenizer

    with reading(f"{folder}: vocab.json and merges.txt", BackboneError, "copy the model again"):
        return stateless(GPT2Tokenizer.from_pretrained(folder).backend_tokenizer)


def _settings(config: Any, fields: Sequence[str]) -> ModelSettings:
    return {
        field: getattr(config, field) for field in fields if isinstance(getattr(config, field, None), str | int | float)
    }


class ClipTower:
    """CLIP's vision transformer; V = its `last_hidden_state` (CLS and patches, no post-layernorm)."""

    kind: Literal["clip", "onnx"] = "clip"

    def __init__(self, folder: Path, image: ImageSettings | None = None) -> None:
        config = read_config(folder, "clip", "clip_vision_model")
        config = config.get("vision_config", config)
        self.folder = folder
        self.sha256 = hash_weights(folder)
        self.model = load_pretrained(CLIPVisionModel, folder, "a CLIP vision model").requires_grad_(False)
        side, patch = int(config.get("image_size", 224)), int(config.get("patch_size", 32))
        if image is None and preprocessor_file(folder).is_file():
            image = read_image_settings(folder)
        self.image = image or ImageSettings(size=(side, side), crop=(side, side), mean=_MEAN, std=_STD)
        if self.image.output_size != (side, side):
            raise BackboneError(
                f"{preprocessor_file(folder)}: makes pixels of {self.image.output_size}, config.json wants "
                f"{side} x {side}: change one of them"
            )
        self.tokens = (side // patch) ** 2 + 1
        self.width = self.model.config.hidden_size
        self.settings = _settings(self.model.config, _CLIP_SETTINGS)

    @torch.no_grad()  # not inference_mode: in training, later layers need gradients
    def embed(self, pixels: UInt8) -> Tensor:
        """Visual embeddings float32 [B, tokens, width] of uint8 pixels [B, H, W, 3]."""
        x = torch.from_numpy(normalize(pixels, self.image)).to(self.model.device)
        hidden: Tensor = self.model(pixel_values=x).last_hidden_state.float()
        return hidden


class ClipProjection(nn.Module):
    """CLIP's projection of the CLS embedding into the space that it shares with text: a layer norm and a product.

    The weights are buffers, because they are frozen; a ClipCap checkpoint stores them, since its tower may lack them.
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


def load_clip_projection(source: str) -> ClipProjection | None:
    """The projection of a CLIP checkpoint; None for an ONNX tower, or for a CLIP that was saved without it."""
    if vision_kind(source) == "onnx":
        return None
    folder = fetch(source)
    config = read_config(folder, "clip", "clip_vision_model")
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with reading(path, BackboneError, "copy the model again"):
            found |= read_tensors(path, lambda name: name.endswith(tuple(_PROJECTION.values())))
    tensors = {ours: t.float() for ours, end in _PROJECTION.items() for name, t in found.items() if name.endswith(end)}
    if tensors.keys() != _PROJECTION.keys():
        return None
    epsilon = float(config.get("vision_config", config).get("layer_norm_eps", 1e-5))
    projected_width, width = tensors["weight"].shape
    projection = ClipProjection(width, projected_width, epsilon)
    projection.load_state_dict(tensors)
    return projection


class OnnxTower:
    """An ONNX graph from normalized pixels, float32 [B, 3, H, W], to embeddings [B, N, d_v]."""

    kind: Literal["clip", "onnx"] = "onnx"
    settings: ModelSettings = {}  # noqa: RUF012

    def __init__(self, file: Path, image: ImageSettings | None = None) -> None:
        import onnxruntime as ort

        self.file, self.folder = file, file.parent
        self.image = image or read_image_settings(self.folder)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come back as exceptions
        options.intra_op_num_threads = torch.get_num_threads()
        # Otherwise its idle threads spin for 50 ms after a run and slow PyTorch down.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        height, width = self.image.output_size
        with reading(file, BackboneError, f"a vision tower has one input, float32 pixels [B, 3, {height}, {width}]"):
            self.session = ort.InferenceSession(file, options, ["CPUExecutionProvider"], enable_fallback=0)
            pixels, outputs = self.session.get_inputs()[0], self.session.get_outputs()
            self._input, self._one_at_a_time = pixels.name, isinstance(pixels.shape[0], int)
            self._output = next((o for o in outputs if o.name == "last_hidden_state"), outputs[0]).name
            probe = self.embed(np.zeros((1, height, width, 3), np.uint8))
        if probe.ndim != 3 or probe.dtype != torch.float32 or not probe.isfinite().all():
            raise BackboneError(
                f"{file}: {self._output} is {probe.dtype} {list(probe.shape)} for a black image, finite: "
                f"{bool(probe.isfinite().all())}; embeddings must be finite float32 [B, N, width]"
            )
        self.tokens, self.width = probe.shape[1:]
        with reading(file, BackboneError, "copy the tower again"):
            self.sha256 = hash_files(list({file, *(self.folder / name for name in external_files(file))}))

    def embed(self, pixels: UInt8) -> Tensor:
        """Visual embeddings float32 [B, tokens, width] of uint8 pixels [B, H, W, 3]."""
        x = normalize(pixels, self.image)
        batches = np.split(x, len(x)) if self._one_at_a_time else [x]
        embedded = [self.session.run([self._output], {self._input: batch})[0] for batch in batches]
        return torch.from_numpy(np.concatenate(embedded))


def normalize(pixels: UInt8, image: ImageSettings) -> Float32:
    """(pixels / 255 - mean) / std of uint8 [B, H, W, 3], as contiguous float32 [B, 3, H, W]."""
    scale = 1 / (255 * np.array(image.std))
    shift = -np.array(image.mean) / np.array(image.std)
    x = pixels * scale.astype(np.float32) + shift.astype(np.float32)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


VisionTower = ClipTower | OnnxTower
"""uint8 pixels [B, H, W, 3] to visual embeddings [B, tokens, width]; `sha256` is the hash of the weight files."""


def load_vision_tower(source: str, revision: str | None = None, *, image: ImageSettings | None = None) -> VisionTower:
    """Load a CLIP vision checkpoint or an ONNX tower (hub id, folder, or `.onnx` file).

    `image` overrides the preprocessing of the folder's `preprocessor_config.json`.
    """
    path = fetch(source, revision)
    if vision_kind(str(path)) == "clip":
        return ClipTower(path, image)
    graphs = [path] if path.suffix == ".onnx" else sorted(path.glob("*.onnx"))
    if len(graphs) != 1:
        raise BackboneError(
            f"{path}: has no config.json and {len(graphs)} .onnx files; give a CLIP folder or one .onnx file"
        )
    return OnnxTower(graphs[0], image)
