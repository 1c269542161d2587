"""Published SmallCap checkpoints (https://github.com/RitaRamo/smallcap), trained or saved with GPT-2.

decoder.transformer.h.{i}.crossattention.{q_attn,c_attn,c_proj}.{weight,bias}   Conv1D [in, out]; c_attn is K, then V
decoder.transformer.h.{i}.ln_cross_attn.{weight,bias}                           never trained
decoder.*, encoder.*                                                            the frozen GPT-2, CLIP's vision tower
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ...backbones import ClipTower, LanguageModel, VisionTower
from ...checkpoint import CheckpointError
from ...files import read_json
from ...methods.smallcap.model import CrossAttentionConfig, SmallCapModel
from ...retrieval.encoder import load_head
from ...runtime.errors import ItuneError
from ...runtime.settings import RetrievalSettings, SearchDefaults, TextSettings
from ..options import ImportOptions
from .state_dict import Imported, State, fitted, load_gpt2

_LAYER = "decoder.transformer.h."
_CROSS = re.compile(r"\.(crossattention\.(q_attn|c_attn|c_proj)|ln_cross_attn)\.(weight|bias)$")
_MODULES = {
    "query": ("crossattention.q_attn", 0, 1),
    "key": ("crossattention.c_attn", 0, 2),
    "value": ("crossattention.c_attn", 1, 2),
    "output": ("crossattention.c_proj", 0, 1),
    "norm": ("ln_cross_attn", 0, 1),
}
"""By our name of a part: SmallCap's module, the piece of the module's outputs, and the number of pieces."""
# SmallCap trains on lower-cased words without punctuation; its text for an empty datastore is that of --disable_rag.
_TEXT = TextSettings(begin=None, prompt="This image shows ", end=".", lower=True, strip_period=True)
_SEARCH = SearchDefaults(num_beams=3, max_new_tokens=25, length_penalty=0.0, early_stopping=True)  # as in infer.py
_CAPTIONS = 4
"""Retrieved captions in a prompt, unless config.json has another number."""


def import_smallcap(
    file: Path, state: State, language: LanguageModel, tower: VisionTower, options: ImportOptions
) -> Imported:
    """Read a SmallCap state dict. It retrieved captions with CLIP RN50x64; ours come from the captioner's own tower."""
    _check_encoder(file, state, tower)
    gpt2 = {name: tensor for name, tensor in state.items() if ".crossattention." not in name and "_cross_" not in name}
    fine_tuned = load_gpt2(file, gpt2, language, "decoder.")
    config = language.model.config
    query = state.get(f"{_LAYER}0.crossattention.q_attn.weight")
    width = 0 if query is None else query.shape[-1]
    model = SmallCapModel(
        language.model,
        CrossAttentionConfig(
            hidden_size=config.n_embd,
            visual_width=tower.width,
            heads=config.n_head,
            head_width=max(1, width // config.n_head),
            norm_epsilon=config.layer_norm_epsilon,
        ),
    )
    found = {name: tensor for name, tensor in state.items() if _CROSS.search(name)}
    own = model.adapter_state()
    # A file of the trained tensors alone has no norms: they keep their initial values.
    sources = {name: _source(name) for name in own if ".norm." not in name or _source(name)[0] in found}
    shapes = {}
    for name, (theirs, _, pieces) in sources.items():
        outputs, *inputs = own[name].shape
        shapes[theirs] = [*inputs, pieces * outputs]
    weights = fitted(file, found, shapes)
    tensors = own | {
        name: weights[theirs].t().chunk(pieces)[piece].contiguous() for name, (theirs, piece, pieces) in sources.items()
    }
    k = _retrieved_captions(file)
    retrieval = RetrievalSettings(k=k, encoder=load_head(tower, options.vision).encoder) if k else None
    return Imported(model, tensors, _TEXT, fine_tuned, retrieval, _SEARCH)


def _source(name: str) -> tuple[str, int, int]:
    """Where SmallCap keeps one of our tensors: the tensor's name, the piece of it, and the number of pieces."""
    _, layer, part, kind = name.split(".")
    module, piece, pieces = _MODULES[part]
    return f"{_LAYER}{layer}.{module}.{kind}", piece, pieces


def _retrieved_captions(file: Path) -> int:
    """How many retrieved captions a prompt has, according to the config.json beside the file."""
    try:
        config = read_json(file.parent / "config.json")
    except ItuneError:
        return _CAPTIONS
    k = config.get("k", _CAPTIONS) if isinstance(config, dict) and config.get("rag", True) else 0
    return k if isinstance(k, int) and k >= 0 else _CAPTIONS


def _check_encoder(file: Path, state: State, tower: VisionTower) -> None:
    """Raise CheckpointError if the checkpoint contains a CLIP tower other than `tower`."""
    if not isinstance(tower, ClipTower):
        return
    own = {f"encoder.{name.removeprefix('vision_model.')}": t for name, t in tower.model.state_dict().items()}
    for name, tensor in own.items():
        theirs = state.get(name)
        if theirs is None or not theirs.is_floating_point():
            continue
        # A file in half precision has a rounded tower.
        if theirs.shape != tensor.shape or not torch.allclose(theirs.float(), tensor.float(), rtol=1e-2, atol=1e-3):
            raise CheckpointError(
                f"--import {file}: tensor {name} differs from the vision tower's; name the CLIP it was trained with: "
                "--vision"
            )
