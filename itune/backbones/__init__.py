"""The frozen parts of a captioner: GPT-2 language models, and CLIP or ONNX vision towers."""

from .models import (
    CACHE_ARGUMENT,
    ClipProjection,
    ClipTower,
    LanguageModel,
    OnnxTower,
    VisionTower,
    load_clip_projection,
    load_language_model,
    load_vision_tower,
    normalize,
    vision_kind,
)
from .pretrained import BackboneError

__all__ = [
    "CACHE_ARGUMENT",
    "BackboneError",
    "ClipProjection",
    "ClipTower",
    "LanguageModel",
    "OnnxTower",
    "VisionTower",
    "load_clip_projection",
    "load_language_model",
    "load_vision_tower",
    "normalize",
    "vision_kind",
]
