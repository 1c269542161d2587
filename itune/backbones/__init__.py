"""Load the frozen parts: a GPT-2 language model and a vision tower (CLIP, or any ONNX graph)."""

from __future__ import annotations

import logging
import os

# The libraries report every unused weight of a CLIP checkpoint's text tower; we leave these out on purpose.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from transformers.utils import logging as transformers_logging

from .language_model import CACHE_ARGUMENT, LanguageModel, load_language_model
from .sources import BackboneError, fetch, load_pretrained, vision_kind
from .towers import (
    PREPROCESSOR,
    ClipProjection,
    ClipTower,
    OnnxTower,
    VisionTower,
    load_clip_projection,
    load_vision_tower,
)

transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

__all__ = [
    "CACHE_ARGUMENT", "PREPROCESSOR", "BackboneError", "ClipProjection", "ClipTower", "LanguageModel", "OnnxTower",
    "VisionTower", "fetch", "load_clip_projection", "load_language_model", "load_pretrained", "load_vision_tower",
    "vision_kind",
]  # fmt: skip
