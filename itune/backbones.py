"""Load the frozen parts: a GPT-2 language model, and a vision tower that is CLIP's or any ONNX graph."""

from __future__ import annotations

import glob
import hashlib
import inspect
import json
import logging
import posixpath
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
from transformers.utils import logging as transformers_logging

from .config_mismatch import config_mismatch
from .files import hash_files
from .json_files import read_json
from .runtime.engines.base import Float32, UInt8
from .runtime.errors import ItuneError, reading
from .runtime.onnx_files import external_files
from .runtime.settings import ImageSettings
from .runtime.text import load_tokenizer, stateless
from .weight_files import read_shapes, read_tensors

# Otherwise transformers reports every weight of a CLIP checkpoint's text tower as unused.
transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(GPT2LMHeadModel.forward).parameters else "past_key_values"
"""Name of the key/value cache in GPT-2's forward pass; newer releases of transformers renamed it."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where transformers looks for weights, in this order."""
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_STEPS = ("_preprocess", "process_image", "resize", "center_crop", "rescale", "normalize")
"""Methods of transformers' image processors that `ImageSettings` reproduces as the base class has them."""
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_UNUSED = ("post_layernorm.weight", "post_layernorm.bias", "logit_scale")
"""Endings of weights that a CLIP may lack: V comes before its last layer norm."""
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


class BackboneError(ItuneError):
    """A language model or vision tower cannot be loaded."""


def fetch(source: str, revision: str | None = None) -> Path:
    """The path of a backbone: an existing one, or the snapshot of a hub repository."""
    path = Path(source)
    if source and path.exists():
        return path
    if not source or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BackboneError(f"{source!r} does not exist: give a folder with the model, or a hub id such as gpt2")
    from huggingface_hub import snapshot_download

    command = f"hf download {source} --local-dir FOLDER"
    mend = f"check the name; without a network, run `{command}` on another machine and give that folder"
    with reading(f"{source} (hub)", BackboneError, mend):
        files = ["*.json", "*.txt", "*.safetensors", "*.onnx"]
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=files, ignore_patterns="*/*"))
        graphs = list(folder.glob("*.onnx"))
        more = [glob.escape(posixpath.normpath(name)) for graph in graphs for name in external_files(graph)]
        if (folder / "config.json").is_file() and not any((folder / name).is_file() for name in _WEIGHTS[:2]):
            more.append("pytorch_model*.bin")
        if more:  # of the same commit, which is the folder's name
            snapshot_download(source, revision=folder.name, allow_patterns=more)
    return folder


def vision_kind(source: str) -> Literal["clip", "onnx"]:
    """The kind of vision tower at a source."""
    return "clip" if (fetch(source) / "config.json").is_file() else "onnx"


def read_config(folder: Path, *model_types: str) -> dict[str, Any]:
    """A backbone's `config.json`, which must name one of the model types."""
    path = folder / "config.json"
    with reading(path, BackboneError, f"give the folder of a {model_types[0]} model"):
        config: dict[str, Any] = read_json(path, BackboneError)
        found = {name: config.get(name) for name in ("model_type", "add_cross_attention")}
    if found["model_type"] not in model_types or found["add_cross_attention"]:
        raise BackboneError(f"{path}: {found}; give the folder of a plain {model_types[0]} model")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files from which transformers loads a folder's weights."""
    with reading(folder, BackboneError, "copy the model again"):
        named = read_json(folder / "config.json").get("transformers_weights")
        for name in [named] if named else _WEIGHTS:
            path = folder / name
            if path.is_file() and name.endswith(".index.json"):
                return sorted({folder / shard for shard in read_json(path)["weight_map"].values()})
            if path.is_file():
                return [path]
    raise BackboneError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin")


def _hash_weights(folder: Path) -> str:
    files = weight_files(folder)
    pattern = "*.safetensors" if files[0].suffix == ".safetensors" else "pytorch_model*.bin"
    with reading(folder, BackboneError, "copy the model again"):
        # Earlier versions hashed all files with such names.
        return hash_files(list({*files, *folder.glob(pattern)}))


def load_pretrained(model: Any, folder: Path, what: str) -> Any:
    """Load a transformers class in float32 and evaluation mode; `what` names the right kind of checkpoint in errors."""
    path, mend = folder / "config.json", f"give the folder of {what}"
    if (folder / "adapter_config.json").exists():  # transformers applies it if peft is installed
        raise BackboneError(
            f"{folder / 'adapter_config.json'}: merge the adapter into the model, then delete this file"
        )
    with reading(folder, BackboneError, mend):
        shapes = {name: shape for file in weight_files(folder) for name, shape in read_shapes(file).items()}
    with reading(path, BackboneError, mend):
        if problem := config_mismatch(model, model.config_class.from_pretrained(folder, local_files_only=True), shapes):
            raise BackboneError(f"{path}: {problem}; put back the config.json of these weights")
    with reading(folder, BackboneError, mend):
        loaded, info = model.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    # transformers fills missing weights with random numbers.
    if missing := sorted(name for name in info["missing_keys"] if not name.endswith(_UNUSED)):
        raise BackboneError(f"{folder}: the weight files lack {missing[0]}: {mend}")
    return loaded.train(False)


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
    sha256 = _hash_weights(folder)
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
        self.sha256 = _hash_weights(folder)
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
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        # Otherwise its idle threads spin for 50 ms after a run and slow PyTorch down.
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
        with reading(file, BackboneError, "copy the tower again"):
            self.sha256 = hash_files(list({file, *(self.folder / name for name in external_files(file))}))

    def embed(self, pixels: UInt8) -> Tensor:
        """Visual embeddings float32 [B, tokens, width] of uint8 pixels [B, H, W, 3]."""
        x = normalize(pixels, self.image)
        batches = np.split(x, len(x)) if self._one_at_a_time else [x]
        embedded = [self.session.run([self._output], {self._input: batch})[0] for batch in batches]
        return torch.from_numpy(np.concatenate(embedded))


def preprocessor_file(folder: Path) -> Path:
    """The file from which transformers builds the image processor; `preprocessor_config.json` if there is none."""
    processor = folder / PROCESSOR
    nested = read_json(processor, BackboneError) if processor.is_file() else None
    return (
        processor if isinstance(nested, dict) and nested.get("image_processor") is not None else folder / PREPROCESSOR
    )


def read_image_settings(folder: Path) -> ImageSettings:
    """The settings of the image processor that transformers builds from the folder's files.

    Raises BackboneError if the processor does something else than resize, crop, rescale by 1/255 and normalize.
    """
    from transformers import AutoImageProcessor, CLIPConfig
    from transformers.image_processing_backends import PilBackend

    path = preprocessor_file(folder)
    with reading(path, BackboneError, "a vision tower needs an image processor's configuration"):
        # Without a type it is CLIP's. The processor's class decides what missing fields mean.
        processor: Any = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, config=CLIPConfig(), backend="pil", trust_remote_code=False, local_files_only=True
        )
        written, _ = processor.get_image_processor_dict(folder, local_files_only=True)
        kind = type(processor).__name__.removesuffix("Pil")
        named = written.get("image_processor_type") or written.get("feature_extractor_type") or kind
        plain = all(getattr(type(processor), step, None) is getattr(PilBackend, step) for step in _STEPS)
        size, crop = processor.size, processor.crop_size if processor.do_center_crop else None
        edge = size.shortest_edge
        supported = {
            f"image_processor_type {named}": plain and kind == _kind(named),
            "do_resize": processor.do_resize,
            "do_center_crop": crop or not edge,
            "do_normalize": processor.do_normalize,
            "do_rescale": processor.do_rescale,
            "do_pad": not processor.do_pad,
            "rescale_factor": abs(255 * processor.rescale_factor - 1) < 1e-4,
            "size.longest_edge": size.longest_edge is None,
            "size": edge or (size.height and size.width),
            f"resample {processor.resample}": processor.resample in _RESAMPLE,
        }
        if unsupported := [field for field, supports in supported.items() if not supports]:
            raise BackboneError(
                f"{path}: {unsupported[0]} is not supported: pixels are resized to a shorter edge and cropped, or "
                "resized to height and width, then rescaled by 1/255 and normalized"
            )
        return ImageSettings(
            size=(edge, edge) if edge else (size.height, size.width),
            resize="shortest_edge" if edge else "squash",
            crop=(crop.height, crop.width) if crop else None,
            mean=_per_channel(processor.image_mean),
            std=_per_channel(processor.image_std),
            interpolation=_RESAMPLE[processor.resample],  # type: ignore[arg-type]
        )


def _kind(named: str) -> str:
    """The class that transformers 5 has for the name of an image processor or an older feature extractor."""
    return named.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")


def _per_channel(value: Any) -> Any:
    """A mean or standard deviation; one number stands for all channels."""
    return (value,) * 3 if isinstance(value, int | float) else value


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
