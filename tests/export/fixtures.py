"""Tiny random checkpoints in real Hugging Face format, whose captions depend on the image."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

from itune.backbones import load_language_model, load_vision_tower
from itune.checkpoint import ModelSource, VisionSource, save_config
from itune.export.graph.builder import Graph
from itune.methods.ituning.model import AdapterConfig, ITuningModel
from itune.methods.ituning.settings import ITuningCheckpoint
from itune.runtime.settings import TextSettings

# For the processes that the verification starts, as for this one.
os.environ["OMP_NUM_THREADS"] = "1"

SIDE = 32
PREPROCESSOR = {
    "size": {"height": SIDE, "width": SIDE},
    "do_center_crop": False,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}
EACH_ENGINE = pytest.mark.parametrize(
    "engine",
    [
        "onnxruntime",
        pytest.param("native", marks=pytest.mark.skipif(find_spec("_itune_native") is None, reason="not compiled")),
    ],
)
CORPUS = ["a dog runs through the green grass .", "two men in red shirts stand on a snowy hill ."]


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 with its tokenizer."""
    folder = tmp_path_factory.mktemp("language-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=48,
        n_embd=64,
        n_layer=3,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    randomize(model, gain=1.5)
    model.transformer.wpe.weight.data *= 4  # or it would repeat itself
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP vision tower, 17 x 48."""
    folder = tmp_path_factory.mktemp("clip-tower")
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=8,
    )
    model = CLIPVisionModel(config)
    randomize(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="session")
def onnx_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random convolutional tower with padding, 16 x 24, in an opset that has to be converted."""
    folder = tmp_path_factory.mktemp("onnx-tower")
    rng = np.random.default_rng(2)

    def weight(*shape: int) -> NDArray[np.float32]:
        return (2 * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    graph = Graph("tower")
    x = graph.input("image", np.float32, ("batch", 3, SIDE, SIDE))
    for i, (width, channels) in enumerate([(3, 16), (16, 24)]):
        kernel = graph.initializer(f"conv{i}.weight", weight(channels, width, 3, 3))
        bias = graph.initializer(f"conv{i}.bias", weight(channels, 1)[:, 0])
        x = graph.op("Conv", x, kernel, bias, pads=[1, 1, 1, 1], strides=[4, 4] if i == 0 else [2, 2])
        x = graph.op("Relu", x)
    x = graph.op("Reshape", x, graph.constant([0, 24, 16]))
    graph.op("Transpose", x, perm=[0, 2, 1], name="features")
    graph.output("features", np.float32, ("batch", 16, 24))
    graph.opsets = {"": 13}
    graph.save(folder / "model.onnx")
    onnx.checker.check_model(onnx.load(folder / "model.onnx"), full_check=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="session")
def clip_checkpoint(tmp_path_factory: pytest.TempPathFactory, language_model: Path, clip_tower: Path) -> Path:
    """Random adapters (biases too) on the upper layers of the random language model."""
    return save_checkpoint(tmp_path_factory.mktemp("clip-checkpoint"), language_model, clip_tower)


@pytest.fixture(scope="session")
def onnx_checkpoint(tmp_path_factory: pytest.TempPathFactory, language_model: Path, onnx_tower: Path) -> Path:
    """The same on the ONNX tower, with a prompt."""
    folder = tmp_path_factory.mktemp("onnx-checkpoint")
    return save_checkpoint(folder, language_model, onnx_tower, prompt="a dog")


@pytest.fixture(scope="session")
def pixels() -> NDArray[np.uint8]:
    """Twelve images: noise, dark noise, a gradient, stripes, and blobs of colour."""
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    noise[1] //= 4
    ramp = np.linspace(0, 255, SIDE)[:, None, None] * np.array([1.0, 0.5, 0.2]) + np.zeros((1, SIDE, 1))
    stripes = np.where(np.arange(SIDE)[None, :, None] // 4 % 2, 255, 20) + np.zeros((SIDE, 1, 3))
    blobs = rng.integers(0, 256, (8, 3, 3, 3), np.uint8)
    large = [np.asarray(Image.fromarray(blob).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for blob in blobs]
    return np.stack([*noise, ramp.astype(np.uint8), stripes.astype(np.uint8), *large])


def save_checkpoint(folder: Path, language_model: Path, tower: Path, prompt: str = "", heads: int = 2) -> Path:
    """Write a checkpoint of random adapters."""
    torch.manual_seed(4)
    language, vision = load_language_model(str(language_model)), load_vision_tower(str(tower))
    adapters = AdapterConfig(
        hidden_size=64, visual_width=vision.width, bottleneck=32, heads=heads, lambda_=2.5, score_scale=0.4
    )
    model = ITuningModel(language.model, adapters, first_adapter_layer=1)
    randomize(model.adapters)
    model.save_adapters(folder / "adapters.safetensors")
    config = ITuningCheckpoint(
        language_model=ModelSource.of_language_model(language, str(language_model), folder),
        vision=VisionSource.of_tower(vision, str(tower), folder),
        bottleneck=adapters.bottleneck,
        heads=adapters.heads,
        lambda_=adapters.lambda_,
        score_scale=0.4,
        first_adapter_layer=1,
        image=vision.image,
        text=TextSettings(prompt=prompt),
        training={"epochs": 3},
    )
    save_config(config, folder)
    return folder


def int8_codes(bundle: Path) -> dict[str, NDArray[np.integer]]:
    """The integers of a bundle's graphs."""
    graphs = {role: Graph.load(bundle / f"{role}.onnx").weights for role in ("vision", "decoder")}
    return {f"{role} {n}": w for role, weights in graphs.items() for n, w in weights.items() if ".int8" in n}


@torch.no_grad()
def randomize(module: torch.nn.Module, gain: float = 1.0) -> None:
    """Weights with so much variance that differences show, biases and norms included."""
    for name, weight in module.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0, gain / np.sqrt(weight[0].numel()))
        elif "ln_" in name or "norm" in name or "layrnorm" in name:
            weight.normal_(float(name.endswith("weight")), 0.1)
        else:
            weight.normal_(0, 0.2)
