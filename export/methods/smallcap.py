"""SmallCap's graphs: keys and values in the vision graph, cross-attention in every block of the decoder.

The decoder's weights keep their checkpoint names; matrices are transposed, and the queries' include 1/sqrt(w).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...methods.smallcap.model import SmallCapModel
from ...runtime.bundle import DecoderSettings
from ..graph.builder import Array, Graph
from ..graph.ops import add_residual, arrays, layer_norm, linear
from .base import ExportMethod, Weights
from .visual_attention import VisualDecoder, append_projections, split_projections


def fold_cross_attention(state: Weights, score_scale: float) -> dict[str, Array]:
    """The decoder's weights, matrices as [in, out], from a SmallCap checkpoint's tensors."""
    decoder = {name: array for name, array in state.items() if name.split(".")[2] not in ("key", "value")}
    return {name: _transposed(name, array * _scale(name, score_scale)) for name, array in decoder.items()}


def unfold_cross_attention(weights: Weights, score_scale: float) -> dict[str, Array]:
    """The inverse of `fold_cross_attention`."""
    return {name: _transposed(name, array / _scale(name, score_scale)) for name, array in weights.items()}


def _scale(name: str, score_scale: float) -> Any:
    return np.float32(score_scale if ".query." in name else 1)


def _transposed(name: str, array: Array) -> Array:
    return array.T if name.endswith(".weight") and ".norm." not in name else array


class SmallCapDecoder(VisualDecoder):
    """A GPT-2 whose blocks attend to the image between self-attention and feed-forward."""

    def __init__(self, model: SmallCapModel, vocabulary: Array | None, fused: bool) -> None:
        config = model.config
        cross = fold_cross_attention(arrays(model.adapter_state()), config.head_width**-0.5)
        super().__init__(model, arrays(model.language_model_state()) | cross, vocabulary, fused)
        self.attend_in(list(range(len(model.layers))), config.heads, config.width)

    def attend_visual(self, i: int, hidden: str) -> str:
        """Cross-attention and its residual."""
        g, name = self.graph, f"layers.{i}"
        with g.scope("cross_attn"):
            query = linear(g, layer_norm(g, hidden, f"{name}.norm", self.epsilon), f"{name}.query")
            return add_residual(g, hidden, linear(g, self.attend_image(i, query), f"{name}.output"))


def _append_visual(graph: Graph, embeddings: str, model: SmallCapModel, tokens: int) -> None:
    projections = {i: (layer.key, layer.value) for i, layer in enumerate(model.layers)}
    append_projections(graph, embeddings, projections, model.config.heads, tokens)


def _settings(model: SmallCapModel) -> dict[str, Any]:
    return {
        "adapter_layers": list(range(len(model.layers))),
        "bottleneck": model.config.width,
        "adapter_heads": model.config.heads,
        "lambda_": None,
        "score_scale": model.config.head_width**-0.5,
    }


def _split_decoder(settings: DecoderSettings, weights: Weights) -> tuple[dict[str, Array], dict[str, Array]]:
    assert settings.score_scale is not None
    cross = {name: array for name, array in weights.items() if name.startswith("layers.")}
    language_model = {name: array for name, array in weights.items() if name not in cross}
    return language_model, unfold_cross_attention(cross, settings.score_scale)


SMALLCAP = ExportMethod(_append_visual, SmallCapDecoder, _settings, _split_decoder, split_projections)
