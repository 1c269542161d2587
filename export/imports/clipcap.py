"""Published ClipCap checkpoints: `ClipCaptionModel` and `ClipCaptionPrefix`.

https://github.com/rmokady/CLIP_prefix_caption: the mapper is `clip_project.*`, the GPT-2 `gpt.*`. Captions begin right
after the prefix and end with a period.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...backbones import LanguageModel, VisionTower, load_clip_projection
from ...methods.clipcap.model import ClipCapConfig, ClipCapModel, Pooling
from ...runtime.settings import TextSettings
from ..options import ImportOptions
from .state_dict import Imported, State, fitted, load_gpt2

_THEIRS, _OURS = "clip_project.", "mapper."
_HEADS = 8  # fixed in ClipCap's code


def import_clipcap(
    file: Path, state: State, language: LanguageModel, tower: VisionTower, options: ImportOptions
) -> Imported:
    """Read a ClipCap state dict; the input width of its mapper decides which image embedding it maps."""
    fine_tuned = load_gpt2(file, state, language, "gpt.")
    mapper = {name: tensor for name, tensor in state.items() if name.startswith(_THEIRS)}
    hidden_size = language.model.config.n_embd
    shape, width = _shape(mapper, hidden_size)
    projection = load_clip_projection(options.vision)
    pooling: Pooling = "cls" if tower.kind == "clip" else "mean"
    if projection is not None and width == len(projection.weight):
        pooling = "projected"
    else:
        projection = None
    config = ClipCapConfig(
        hidden_size=hidden_size,
        visual_width=tower.width,
        pooling=pooling,
        projected_width=None if projection is None else width,
        layer_norm_eps=1e-5 if projection is None else projection.epsilon,
        normalize=options.normalize,
        **shape,
    )
    model = ClipCapModel(language.model, config)
    if projection is not None:
        model.load_projection(projection)
    own = model.adapter_state()
    expected = {n.replace(_OURS, _THEIRS, 1): t.shape for n, t in own.items() if n.startswith(_OURS)}
    weights = {n.replace(_THEIRS, _OURS, 1): t for n, t in fitted(file, mapper, expected).items()}
    text = TextSettings(begin=None, end=".", strip_period=True)
    return Imported(model, own | weights, text, fine_tuned)


def _shape(mapper: State, hidden_size: int) -> tuple[dict[str, Any], int]:
    """The mapper's fields of `ClipCapConfig` and the width of its input; `fitted` finds what contradicts them."""
    linear, mlp = mapper.get(f"{_THEIRS}linear.weight"), mapper.get(f"{_THEIRS}model.0.weight")
    if linear is None and mlp is not None:
        rows = len(mapper.get(f"{_THEIRS}model.2.weight", ()))
        return {"mapper": "mlp", "prefix_length": max(1, rows // hidden_size)}, mlp.shape[-1]
    layers = {name.split(".")[3] for name in mapper if name.startswith(f"{_THEIRS}transformer.layers.")}
    return {
        "mapper": "transformer",
        "prefix_length": max(1, len(mapper.get(f"{_THEIRS}prefix_const", ()))),
        "clip_length": max(1, -(-(0 if linear is None else len(linear)) // hidden_size)),
        "mapper_layers": max(1, len(layers)),
        "mapper_heads": _HEADS,
    }, 0 if linear is None else linear.shape[-1]
