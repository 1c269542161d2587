"""The exporter's side of a captioning method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...runtime.bundle import DecoderSettings
from ..graph.builder import Array, Graph
from ..graph.decoder import Decoder

Weights = Mapping[str, Array]


@dataclass(frozen=True)
class ExportMethod:
    """How to write a method's graphs, and how to take them apart again. `model` is the method's CaptionModel."""

    append_visual: Callable[[Graph, str, Any, int], None]
    """(graph, embeddings, model, N): append the outputs `visual.NAME` to embeddings [images, N, d_v]."""
    decoder: Callable[[Any, Array | None, bool], Decoder]
    """(model, vocabulary, fused): the decoder's builder."""
    settings: Callable[[Any], dict[str, Any]]
    """(model): the manifest's fields `decoder.*` about attention to the image."""
    split_decoder: Callable[[DecoderSettings, Weights], tuple[dict[str, Array], dict[str, Array]]]
    """(settings, weights): the weights of the language model and of the adapters, under their own names."""
    split_vision: Callable[[DecoderSettings, Weights], dict[str, Array]]
    """(settings, weights): the adapters' weights in a vision graph, under their checkpoint names."""
