"""SmallCap's graphs: keys and values in the vision graph, cross-attention in every block of the decoder.

The decoder's weights keep their checkpoint names; matrices are transposed, and the queries' include 1/sqrt(w).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...methods.smallcap.model import SmallCapModel
from ...runtime.bundle import DecoderSettings
from ..graph.builder import Array, Weights
from ..graph.ops import add_residual, arrays, layer_norm, linear
from .visual_attention import VisualDecoder


def fold_cross_attention(state: Weights, score_scale: float) -> dict[str, Array]:
    """The decoder's weights, matrices as [in, out], from a SmallCap checkpoint's tensors."""
    decoder = {name: array for name, array in state.items() if name.split(".")[2] not in ("key", "value")}
    return {name: (array * _scale(name, score_scale)).T for name, array in decoder.items()}


def unfold_cross_attention(settings: DecoderSettings, weights: Weights) -> tuple[dict[str, Array], dict[str, Array]]:
    """The inverse of `fold_cross_attention`: the language model's weights, and the adapters' in the decoder."""
    assert settings.score_scale is not None
    cross = {name: array for name, array in weights.items() if name.startswith("layers.")}
    language_model = {name: array for name, array in weights.items() if name not in cross}
    return language_model, {n: (array / _scale(n, settings.score_scale)).T for n, array in cross.items()}


def _scale(name: str, score_scale: float) -> Any:
    return np.float32(score_scale if ".query." in name else 1)


class SmallCapDecoder(VisualDecoder):
    """A GPT-2 whose blocks attend to the image between self-attention and feed-forward."""

    def __init__(self, model: SmallCapModel, vocabulary: Array | None, fused: bool) -> None:
        cross = fold_cross_attention(arrays(model.adapter_state()), model.config.head_width**-0.5)
        super().__init__(model, arrays(model.language_model_state()) | cross, vocabulary, fused)

    def attend_visual(self, i: int, hidden: str) -> str:
        """Cross-attention and its residual."""
        g, name = self.graph, f"layers.{i}"
        with g.scope("cross_attn"):
            query = linear(g, layer_norm(g, hidden, f"{name}.norm", self.epsilon), f"{name}.query")
            return add_residual(g, hidden, linear(g, self.attend_image(i, query), f"{name}.output"))


def settings(model: SmallCapModel) -> dict[str, Any]:
    """The manifest's fields about attention to the image."""
    return {
        "adapter_layers": model.adapter_layers,
        "bottleneck": model.config.width,
        "adapter_heads": model.config.heads,
        "lambda_": None,
        "score_scale": model.config.head_width**-0.5,
    }
