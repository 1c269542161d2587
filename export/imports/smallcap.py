"""The tensors of a published SmallCap checkpoint (https://github.com/RitaRamo/smallcap), as ours.

decoder.transformer.h.{i}.crossattention.{q_attn,c_attn,c_proj}.{weight,bias}   Conv1D [in, out]; K before U in c_attn
decoder.transformer.h.{i}.ln_cross_attn.{weight,bias}                           never trained
decoder.*, encoder.*                                                            the frozen GPT-2, CLIP's vision tower
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from ...backbones import ClipTower, LanguageModel, VisionTower
from ...checkpoint import CheckpointError
from ...methods.smallcap.model import CrossAttentionConfig, SmallCapModel
from ...runtime.settings import SearchDefaults, TextSettings
from .state_dicts import State, fitted, weight

_CROSS = re.compile(r"decoder\.transformer\.h\.(\d+)\.(crossattention\.\w+_(?:attn|proj)|ln_cross_attn)\.(weight|bias)")
_PARTS = {
    "crossattention.q_attn": ("query",),
    "crossattention.c_attn": ("key", "value"),
    "crossattention.c_proj": ("output",),
    "ln_cross_attn": ("norm",),
}
# Its data are lower-cased words without punctuation; the text of `--disable_rag` stands for an empty datastore, too.
TEXT = TextSettings(begin=None, prompt="This image shows ", end=".", lower=True, strip_period=True)
SEARCH = SearchDefaults(num_beams=3, max_new_tokens=25, length_penalty=0.0, early_stopping=True)
"""The options of its infer.py."""


def is_smallcap(name: str) -> bool:
    """Whether a tensor of that name is SmallCap's own."""
    return ".crossattention." in name


def language_model_state(state: State) -> dict[str, Tensor]:
    """The GPT-2 in a checkpoint, under its own names; empty where only what was trained is saved."""
    decoder = {name.removeprefix("decoder."): t for name, t in state.items() if name.startswith("decoder.")}
    return {name: t for name, t in decoder.items() if ".crossattention." not in name and ".ln_cross_attn." not in name}


def read_smallcap(file: Path, state: State, language: LanguageModel, tower: VisionTower) -> SmallCapModel:
    """The model of a state dict, on its frozen parts.

    Raises:
        CheckpointError: the tensors fit neither another nor the language model or tower, or CLIP is another one.
    """
    gpt2 = language.model.config
    _check_encoder(file, state, tower)
    tensors = _cross_attention(file, state)
    query, key = tensors.get("layers.0.query.weight"), tensors.get("layers.0.key.weight")
    if query is None or key is None:
        raise CheckpointError(
            f"--import {file}: lacks decoder.transformer.h.0.crossattention.q_attn.weight or c_attn.weight; of "
            "SmallCap's decoders, GPT-2 can be imported"
        )
    if (query.shape[1], key.shape[1]) != (gpt2.n_embd, tower.width):
        raise CheckpointError(
            f"--import {file}: its cross-attention joins a language model of width {query.shape[1]} to image "
            f"embeddings of {key.shape[1]}, where those here are of {gpt2.n_embd} and {tower.width}: name its own with "
            "--language-model and --vision"
        )
    if len(query) % gpt2.n_head:
        raise CheckpointError(
            f"--import {file}: its queries are of {len(query)}, which the {gpt2.n_head} heads of the language model do "
            "not divide: name its own with --language-model"
        )
    config = CrossAttentionConfig(
        hidden_size=gpt2.n_embd,
        visual_width=tower.width,
        heads=gpt2.n_head,
        head_width=len(query) // gpt2.n_head,
        norm_epsilon=gpt2.layer_norm_epsilon,
    )
    model = SmallCapModel(language.model, config)
    # Of those who saved what they trained alone, the norm is as it was initialised.
    expected = model.adapter_state()
    norms = {name: tensor for name, tensor in expected.items() if ".norm." in name}
    model.load_adapter_state(fitted(file, norms | tensors, expected, _original_name), file)
    return model


def retrieved_captions(file: Path) -> int:
    """How many captions its prompts hold, as the config.json beside it says: 4 unless trained otherwise."""
    try:
        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 4
    k = config.get("k", 4) if isinstance(config, dict) and config.get("rag", True) else 0
    return k if isinstance(k, int) and k >= 0 else 4


def _original_name(name: str) -> str:
    """Of one of our cross-attention's weights, the name in SmallCap's own code."""
    _, layer, part, kind = name.split(".")
    theirs = next(theirs for theirs, ours in _PARTS.items() if part in ours)
    return f"decoder.transformer.h.{layer}.{theirs}.{kind}"


def _cross_attention(file: Path, state: State) -> dict[str, Tensor]:
    """Cross-attention under our checkpoint's names, in Linear layout; buffers and other tensors are left out."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _CROSS.fullmatch(name)
        if match is None or match[2] not in _PARTS:
            continue
        parts = _PARTS[match[2]]
        is_matrix = match[3] == "weight" and parts != ("norm",)
        trained = weight(file, name, tensor, 2 if is_matrix else 1)
        linear = trained.T if is_matrix else trained
        for part, piece in zip(parts, linear.tensor_split(len(parts)), strict=True):
            tensors[f"layers.{match[1]}.{part}.{match[3]}"] = piece.contiguous()
    return tensors


def _check_encoder(file: Path, state: State, tower: VisionTower) -> None:
    """Raise CheckpointError if the checkpoint has a CLIP and it is not the tower."""
    if not isinstance(tower, ClipTower):
        return
    own = {name.removeprefix("vision_model."): t for name, t in tower.model.state_dict().items()}
    for name, tensor in own.items():
        theirs = state.get(f"encoder.{name}")
        if theirs is None or not torch.is_floating_point(theirs):
            continue
        # Training in half precision leaves a frozen tower as it is, saving it so would round it.
        if theirs.shape != tensor.shape or not torch.allclose(theirs.float(), tensor.float(), rtol=1e-2, atol=1e-3):
            raise CheckpointError(
                f"--import {file}: its tensor encoder.{name} is not that of the vision tower: name the CLIP that it "
                "was trained on with --vision"
            )
