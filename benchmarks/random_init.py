"""Random models of the paper's sizes, for benchmarks without a download.

Speed does not depend on the weights, but a comparison of captions does: with the usual initialisation (normal, 0.02)
GPT-2 repeats one token and ignores the image. Here weights are scaled so that every layer changes the hidden states
noticeably, different images get different captions, and the best tokens score well above the rest.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.pytorch_utils import Conv1D

from itune.backbones import load_language_model, load_vision_tower
from itune.checkpoint import CONFIG_FILE, WEIGHTS_FILE, ModelSource, VisionSource, save_config
from itune.files import atomic_folder
from itune.methods.ituning.model import AdapterConfig, ITuningModel
from itune.methods.ituning.settings import ITuningCheckpoint
from itune.methods.schemas import load_config
from itune.runtime.errors import ItuneError
from itune.runtime.settings import TextSettings

LANGUAGE_MODEL, VISION, CHECKPOINT = "language-model", "vision", "checkpoint"
END = "<|endoftext|>"


@dataclass(frozen=True)
class Geometry:
    """Sizes of a captioner: a GPT-2, a CLIP vision transformer, and adapters on every decoder layer."""

    width: int
    layers: int
    heads: int
    vocab_size: int = 50_257
    positions: int = 1024
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    lambda_: float = 2.0

    @property
    def bottleneck(self) -> int:
        """The paper's adapter width r = d / 2."""
        return self.width // 2

    @property
    def branch_scale(self) -> float:
        """The scale of each branch of a layer, so that all layers together contribute as much as the embedding."""
        return _LOGIT_SPREAD / math.sqrt(self.width * self.layers)


GEOMETRIES = {
    "base": Geometry(width=768, layers=12, heads=12),
    "medium": Geometry(width=1024, layers=24, heads=16),
    "large": Geometry(width=1280, layers=36, heads=20),
}
"""GPT-2 base, medium and large with CLIP ViT-B/16."""

_SEED = 0
_BIAS = 0.1
_LOGIT_SPREAD = 5.0  # standard deviation of the logits
_POSITION = 2.0  # size of GPT-2's position embeddings, relative to token embeddings: prevents loops
_FOCUS = 1.5  # sharpens the adapters' attention to some patches, neither one nor all


def build_checkpoint(geometry: Geometry, folder: Path) -> Path:
    """Write `language-model/`, `vision/` and `checkpoint/` into `folder`, or reuse them; returns the checkpoint.

    Raises:
        ItuneError: `folder` contains a checkpoint of another geometry.
    """
    checkpoint = folder / CHECKPOINT
    recipe = {"random_init": asdict(geometry) | {"seed": _SEED}}
    if (checkpoint / CONFIG_FILE).is_file():
        if load_config(checkpoint).training != recipe:
            raise ItuneError(f"{checkpoint} is a checkpoint of another size or version: choose another --work-dir")
        return checkpoint
    generator = torch.Generator().manual_seed(_SEED)
    _write_language_model(geometry, folder / LANGUAGE_MODEL, generator)
    _write_vision(geometry, folder / VISION, generator)
    _write_adapters(geometry, folder, recipe, generator)
    return checkpoint


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of GPT-2's shape: 256 bytes, words " w256", ..., and the end token last."""
    words = [f"Ġw{i}" for i in range(256, vocab_size - 1)]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def _write_language_model(geometry: Geometry, folder: Path, generator: torch.Generator) -> None:
    end = geometry.vocab_size - 1
    config = GPT2Config(
        vocab_size=geometry.vocab_size,
        n_positions=geometry.positions,
        n_embd=geometry.width,
        n_layer=geometry.layers,
        n_head=geometry.heads,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config)
    _randomize(model, generator)
    transformer: Any = model.transformer
    with torch.no_grad():
        # As in trained models, the embeddings' lengths vary, so that a few thousand tokens compete instead of all. With
        # exponential squares, the logits have a Laplace distribution, whose largest values lie far apart.
        lengths = torch.empty(geometry.vocab_size, 1).exponential_(generator=generator).sqrt()
        transformer.wte.weight.mul_(lengths * _LOGIT_SPREAD)
        transformer.wpe.weight.mul_(_POSITION * _LOGIT_SPREAD)
        for block in transformer.h:
            for branch in (block.attn.c_proj, block.mlp.c_proj):
                branch.weight.mul_(geometry.branch_scale)
                branch.bias.mul_(geometry.branch_scale)
        # The head shares the embedding, and a hidden state resembles its own token's embedding. Random reflections
        # keep the model from repeating that token.
        transformer.ln_f.weight.mul_(2.0 * torch.randint(0, 2, (geometry.width,), generator=generator) - 1)
    with atomic_folder(folder) as staging:
        model.save_pretrained(staging)
        make_tokenizer(geometry.vocab_size).save(str(staging / "tokenizer.json"))


def _write_vision(geometry: Geometry, folder: Path, generator: torch.Generator) -> None:
    side = geometry.image_size
    config = CLIPVisionConfig(
        hidden_size=geometry.vision_width,
        intermediate_size=4 * geometry.vision_width,
        num_hidden_layers=geometry.vision_layers,
        num_attention_heads=geometry.vision_heads,
        image_size=side,
        patch_size=geometry.patch_size,
    )
    model = CLIPVisionModel(config)
    _randomize(model, generator)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("position_embedding.weight"):
                weight.mul_(math.sqrt(geometry.vision_width))  # position counts as much as content
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    with atomic_folder(folder) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)


def _write_adapters(geometry: Geometry, folder: Path, recipe: dict[str, Any], generator: torch.Generator) -> None:
    language = load_language_model(str(folder / LANGUAGE_MODEL))
    tower = load_vision_tower(str(folder / VISION))
    adapters = AdapterConfig(geometry.width, tower.width, geometry.bottleneck, lambda_=geometry.lambda_)
    model = ITuningModel(language.model, adapters)
    _randomize(model.adapters, generator)
    with torch.no_grad():
        for name, weight in model.adapters.named_parameters():
            if ".query." in name:
                weight.mul_(_FOCUS)
            elif ".output." in name:
                weight.mul_(geometry.branch_scale / (geometry.lambda_ if weight.ndim > 1 else 1))
    assert adapters.score_scale is not None
    with atomic_folder(folder / CHECKPOINT) as staging:
        model.save_adapters(staging / WEIGHTS_FILE)
        config = ITuningCheckpoint(
            language_model=ModelSource.of_language_model(language, str(language.folder), folder / CHECKPOINT),
            vision=VisionSource.of_tower(tower, str(tower.folder), folder / CHECKPOINT),
            bottleneck=adapters.bottleneck,
            lambda_=adapters.lambda_,
            score_scale=adapters.score_scale,
            image=tower.image,
            text=TextSettings(begin=END, end=END),
            training=recipe,
        )
        save_config(config, staging)


@torch.no_grad()
def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Draw matrices that preserve their input's scale, and biases and norms that are not zeros and ones."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            if isinstance(part, nn.LayerNorm):
                weight.normal_(float(name == "weight"), _BIAS, generator=generator)
            elif weight.ndim == 1:
                weight.normal_(0, _BIAS, generator=generator)
            elif isinstance(part, nn.Linear | Conv1D):
                inputs = 1 if isinstance(part, nn.Linear) else 0
                weight.normal_(0, 1 / math.sqrt(weight.shape[inputs]), generator=generator)
                # Cancels GELU's positive mean, which would make all hidden states alike.
                weight.sub_(weight.mean(inputs, keepdim=True))
            else:  # an embedding, or the convolution over patches
                weight.normal_(0, 1 / math.sqrt(weight[0].numel()), generator=generator)
