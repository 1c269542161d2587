"""What a captioner must be so that it can be exported; training asks before its first step."""

from __future__ import annotations

from importlib.util import find_spec

from ..backbones import ClipTower, LanguageModel, VisionTower
from ..backbones.pretrained import BackboneError
from ..runtime.settings import ACTIVATIONS


def check_exportable(language: LanguageModel, tower: VisionTower) -> None:
    """Raise BackboneError, naming file and field, if a captioner with these frozen parts cannot be exported.

    The graph of an ONNX tower is only asked where `onnx`, which training does not need, is installed.
    """
    parts = [(language.folder, "activation_function", language.model.config.activation_function)]
    if isinstance(tower, ClipTower):
        parts.append((tower.folder, "hidden_act", tower.model.config.hidden_act))
    elif find_spec("onnx"):
        from .graph.onnx_tower import load_graph

        load_graph(tower)
    for folder, field, value in parts:
        if value not in ACTIVATIONS:
            raise BackboneError(
                f"{folder / 'config.json'}: {field} {value!r} cannot be exported: use a model with one of "
                f"{', '.join(ACTIVATIONS)}"
            )
