"""Load the frozen parts: a GPT-2 language model and a vision tower (CLIP, or any ONNX graph)."""

from __future__ import annotations

import inspect
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from .files import hash_files
from .runtime.engines.base import UInt8
from .runtime.errors import ItuneError, reading
from .runtime.settings import ImageSettings

# The libraries report every unused text-tower weight of a CLIP checkpoint; that is meant here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from transformers import CLIPVisionModel, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(GPT2LMHeadModel.forward).parameters else "past_key_values"
"""What GPT-2's forward pass calls its key/value cache; newer releases of transformers have renamed it."""
PREPROCESSOR = "preprocessor_config.json"
_PROJECTION = ("visual_projection.weight", "post_layernorm.weight", "post_layernorm.bias")
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class BackboneError(ItuneError):
    """A language model or vision tower cannot be loaded."""


@dataclass(frozen=True)
class LanguageModel:
    """A frozen GPT-2 with its tokenizer."""

    model: GPT2LMHeadModel
    tokenizer: Tokenizer
    folder: Path
    sha256: str


class VisionTower(Protocol):
    """uint8 pixels [B, H, W, 3] -> visual embeddings [B, tokens, width]."""

    kind: Literal["clip", "onnx"]
    folder: Path
    sha256: str
    tokens: int
    width: int
    image: ImageSettings

    def embed(self, pixels: UInt8) -> Tensor:
        """Visual embeddings float32 [B, tokens, width] of uint8 pixels [B, H, W, 3]."""
        ...


def fetch(source: str, revision: str | None = None) -> Path:
    """The folder of a backbone: an existing one, or a hub repository's snapshot."""
    path = Path(source)
    if path.exists():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BackboneError(f"{source} does not exist: give a folder with the model, or a hub id such as gpt2")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = ["*.json", "*.txt", "*.safetensors", "*.onnx", "*.onnx.data"]
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=files, ignore_patterns="*/*"))
        if not list(folder.glob("*.safetensors")) and not list(folder.glob("*.onnx")):
            snapshot_download(source, revision=revision, allow_patterns="pytorch_model*.bin")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BackboneError(
            f"{source} is not a folder here and cannot be fetched from the hub ({type(error).__name__}): "
            "download it elsewhere and give the path of its folder instead"
        ) from None
    return folder


def load_language_model(source: str, revision: str | None = None) -> LanguageModel:
    """Load a GPT-2-family checkpoint (hub id or folder) in float32, with its `tokenizer.json`."""
    folder = fetch(source, revision)
    config = _read_config(folder, "gpt2", "a GPT-2 language model")
    weights = weight_files(folder)
    model, missing = load_pretrained(GPT2LMHeadModel, folder, "GPT-2")
    _require_weights(folder, missing)
    if config.get("add_cross_attention"):
        raise BackboneError(f"{folder}: has cross-attention of its own; give a plain GPT-2")
    model.train(False)
    if model.config.activation_function == "gelu_new":
        # The same function in one kernel: a fifth of a training step, and of its activations, saved.
        blocks: Any = model.transformer.h
        for block in blocks:
            block.mlp.act = nn.GELU(approximate="tanh")
    return LanguageModel(model, load_tokenizer(folder), folder, hash_files(weights))


def load_pretrained(model: Any, folder: Path, what: str) -> tuple[Any, list[str]]:
    """A class's `from_pretrained` in float32, and the names of weights that the folder lacks: those are random.

    Raises:
        BackboneError: something in the folder is damaged, or it is not `what`.
    """
    try:
        loaded, info = model.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # of a damaged file the libraries raise nearly everything
        raise BackboneError(f"{folder}: cannot be loaded as {what}: {first_line(error)}") from None
    return loaded, sorted(info["missing_keys"])


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's `tokenizer.json`, or the same built from GPT-2's `vocab.json` and `merges.txt`."""
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BackboneError(f"{path} is not a tokenizer: {first_line(error)}") from None
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        from transformers import GPT2Tokenizer

        try:
            tokenizer: Tokenizer = GPT2Tokenizer.from_pretrained(folder).backend_tokenizer
        except Exception as error:
            raise BackboneError(f"{folder}: vocab.json and merges.txt make no tokenizer: {first_line(error)}") from None
        return tokenizer
    raise BackboneError(f"{folder} has no tokenizer.json (nor vocab.json and merges.txt): put one there")


def load_vision_tower(
    source: str, revision: str | None = None, *, image: ImageSettings | None = None, device: str = "cpu"
) -> VisionTower:
    """Load a CLIP vision checkpoint or an ONNX tower (hub id, folder, or `.onnx` file).

    `image` overrides the preprocessing that stands in the folder's `preprocessor_config.json`.
    """
    path = fetch(source, revision)
    if path.suffix == ".onnx":
        return OnnxTower(path, image)
    if not (path / "config.json").is_file():
        graphs = sorted(path.glob("*.onnx"))
        if len(graphs) == 1:
            return OnnxTower(graphs[0], image)
        found = f"{len(graphs)} .onnx files" if graphs else "neither config.json nor an .onnx file"
        raise BackboneError(f"{path}: has {found}; give a CLIP folder or one .onnx file as the vision tower")
    return ClipTower(path, image, device)


def vision_kind(source: str, revision: str | None = None) -> Literal["clip", "onnx"]:
    """What `load_vision_tower` takes a source for."""
    path = fetch(source, revision)
    return "clip" if (path / "config.json").is_file() else "onnx"


@dataclass(frozen=True)
class ClipProjection:
    """What a CLIP tower's CLS position goes through to become the embedding that is compared with text."""

    norm_weight: Tensor  # [d_v]
    norm_bias: Tensor  # [d_v]
    weight: Tensor  # [projected width, d_v]
    epsilon: float

    def project(self, cls: Tensor) -> Tensor:
        """Image features [images, projected width] of CLS embeddings [images, d_v]."""
        norm_weight, norm_bias, weight = (t.to(cls.device) for t in (self.norm_weight, self.norm_bias, self.weight))
        return F.linear(F.layer_norm(cls, norm_bias.shape, norm_weight, norm_bias, self.epsilon), weight)


def load_clip_projection(source: str, revision: str | None = None) -> ClipProjection | None:
    """The projection of a CLIP checkpoint; None for an ONNX tower, or a vision tower that was saved without it."""
    if vision_kind(source, revision) == "onnx":
        return None
    folder = fetch(source, revision)
    config = _read_config(folder, ("clip", "clip_vision_model"), "a CLIP model")
    epsilon = float(config.get("vision_config", config).get("layer_norm_eps", 1e-5))
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        found |= _read_tensors(path, _PROJECTION)
    tensors = [next((t for name, t in found.items() if name.endswith(end)), None) for end in _PROJECTION]
    weight, norm_weight, norm_bias = (None if t is None else t.float() for t in tensors)
    if weight is None or norm_weight is None or norm_bias is None:
        return None
    return ClipProjection(norm_weight, norm_bias, weight, epsilon)


def _read_tensors(path: Path, ends: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a weight file whose names end so; the others are not read where the format allows that."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.endswith(ends)}  # noqa: SIM118
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return {name: tensor for name, tensor in state.items() if name.endswith(ends)}
    except (OSError, RuntimeError, ValueError, AttributeError, SafetensorError, UnpicklingError) as error:
        raise BackboneError(f"{path} cannot be read: {first_line(error)}") from None


class ClipTower:
    """CLIP's vision transformer; V = its `last_hidden_state` (CLS and patches, no post-layernorm)."""

    kind: Literal["clip", "onnx"] = "clip"

    def __init__(self, folder: Path, image: ImageSettings | None = None, device: str = "cpu") -> None:
        config = _read_config(folder, ("clip", "clip_vision_model"), "a CLIP model")
        config = config.get("vision_config", config)
        self.folder = folder
        self.sha256 = hash_files(weight_files(folder))
        model, missing = load_pretrained(CLIPVisionModel, folder, "a CLIP vision model")
        _require_weights(folder, [name for name in missing if ".post_layernorm." not in f".{name}"])  # not part of V
        model.train(False)
        self.model = model.requires_grad_(False).to(device)
        side, patch = int(config.get("image_size", 224)), int(config.get("patch_size", 32))
        self.image = (
            image
            or read_image_settings(folder)
            or ImageSettings(size=(side, side), crop=(side, side), mean=_CLIP_MEAN, std=_CLIP_STD)
        )
        if self.image.output_size != (side, side):
            raise BackboneError(
                f"{folder}: {PREPROCESSOR} makes pixels of {self.image.output_size}, "
                f"config.json asks for {side} x {side}"
            )
        self.tokens = (side // patch) ** 2 + 1
        self.width = model.config.hidden_size

    @torch.no_grad()  # not inference_mode: training puts gradients through what comes after
    def embed(self, pixels: UInt8) -> Tensor:
        """Visual embeddings float32 [B, tokens, width] of uint8 pixels [B, H, W, 3]."""
        x = torch.from_numpy(normalize(pixels, self.image)).to(self.model.device)
        hidden: Tensor = self.model(pixel_values=x).last_hidden_state.float()
        return hidden


class OnnxTower:
    """An ONNX graph from normalised pixels, float32 [B, 3, H, W], to embeddings [B, N, d_v]."""

    kind: Literal["clip", "onnx"] = "onnx"

    def __init__(self, file: Path, image: ImageSettings | None = None) -> None:
        import onnxruntime as ort

        from .runtime.engines.onnxruntime import session_options

        self.file = file
        self.folder = file.parent
        settings = image or read_image_settings(self.folder)
        if settings is None:
            raise BackboneError(f"{self.folder}: an ONNX tower needs a {PREPROCESSOR} beside it")
        self.image = settings
        with reading(file, BackboneError, "ONNX Runtime cannot load it"):
            options = session_options(torch.get_num_threads())
            self.session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        height, width = self.image.output_size
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
            raise BackboneError(f"{file}: a vision tower has one input, float32 pixels [B, 3, H, W]")
        if any(isinstance(n, int) and n != m for n, m in zip(inputs[0].shape[1:], (3, height, width), strict=True)):
            raise BackboneError(
                f"{file}: takes pixels {inputs[0].shape[1:]}, {PREPROCESSOR} makes {[3, height, width]}"
            )
        named = [o for o in outputs if o.name == "last_hidden_state"] or outputs
        self._output = named[0].name
        self._one_at_a_time = isinstance(inputs[0].shape[0], int)
        probe = self.embed(np.zeros((1, height, width, 3), np.uint8))
        if probe.ndim != 3:
            raise BackboneError(
                f"{file}: output {self._output} has shape {list(probe.shape)}; embeddings are [B, N, width]"
            )
        self.tokens, self.width = probe.shape[1:]
        external = sorted(self.folder.glob(f"{file.name}.data*"))
        self.sha256 = hash_files([file, *external])

    def embed(self, pixels: UInt8) -> Tensor:
        """Visual embeddings float32 [B, tokens, width] of uint8 pixels [B, H, W, 3]."""
        x = normalize(pixels, self.image)
        name = self.session.get_inputs()[0].name
        batches = np.split(x, len(x)) if self._one_at_a_time else [x]
        return torch.from_numpy(np.concatenate([self.session.run([self._output], {name: b})[0] for b in batches]))


def normalize(pixels: UInt8, image: ImageSettings) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(pixels / 255 - mean) / std of uint8 [B, H, W, 3], as contiguous float32 [B, 3, H, W]."""
    scale = 1 / (255 * np.array(image.std))
    shift = -np.array(image.mean) / np.array(image.std)
    x = pixels * scale.astype(np.float32) + shift.astype(np.float32)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def read_image_settings(folder: Path) -> ImageSettings | None:
    """Preprocessing from a Hugging Face `preprocessor_config.json`; None when there is no such file."""
    path = folder / PREPROCESSOR
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not (config.get("do_resize", True) and config.get("do_normalize", True)):
            raise BackboneError(f"{path}: do_resize and do_normalize must be true for a vision tower")
        factor = config.get("rescale_factor", 1 / 255)
        if not config.get("do_rescale", True) or abs(255 * factor - 1) > 1e-4:
            raise BackboneError(f"{path}: pixels must be rescaled by 1/255: do_rescale true, and rescale_factor that")
        size = config["size"]
        if isinstance(size, dict) and "longest_edge" in size:
            raise BackboneError(f"{path}: size.longest_edge is not supported; give shortest_edge, or height and width")
        edge = size.get("shortest_edge") if isinstance(size, dict) else size
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
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise BackboneError(f"{path}: not an image preprocessor's configuration: {first_line(error)}") from None


def _read_config(folder: Path, model_type: str | tuple[str, ...], what: str) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise BackboneError(f"{path} cannot be read ({first_line(error)}): give the folder of {what}") from None
    if found not in ((model_type,) if isinstance(model_type, str) else model_type):
        raise BackboneError(f"{path}: model_type is {found!r}; give the folder of {what}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files with a backbone's weights. Raises BackboneError where there are none."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise BackboneError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin")
    return weights


def _require_weights(folder: Path, missing: list[str]) -> None:
    if missing:
        raise BackboneError(
            f"{folder}: config.json asks for {missing[0]}, which its weight files lack: copy the model again"
        )


def first_line(error: Exception) -> str:
    """What a library says, short enough to be quoted."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
