"""Caption images with an exported bundle: NumPy, ONNX Runtime, tokenizers and Pillow, never torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import BundleError, DatastoreError, EngineError, ImageError, ItuneError, SearchError

if TYPE_CHECKING:
    from .attention.explanation import Explanation
    from .attention.heatmap import draw_heatmap
    from .bundle import Bundle
    from .caption import Candidate, Caption
    from .captioner import Captioner
    from .retrieval.datastore import Datastore

_MODULES = {
    "Bundle": ".bundle",
    "Candidate": ".caption",
    "Caption": ".caption",
    "Captioner": ".captioner",
    "Datastore": ".retrieval.datastore",
    "Explanation": ".attention.explanation",
    "draw_heatmap": ".attention.heatmap",
}
"""Imported when first used: `import itune` must be fast."""
__all__ = ["BundleError", "DatastoreError", "EngineError", "ImageError", "ItuneError", "SearchError"]
__all__ += ["Bundle", "Candidate", "Caption", "Captioner", "Datastore", "Explanation", "draw_heatmap"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
