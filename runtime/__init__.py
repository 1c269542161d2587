"""Caption images with an exported bundle: NumPy, ONNX Runtime, tokenizers and Pillow, never torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention.explanation import Explanation
    from .attention.heatmap import draw_heatmap
    from .bundle import Bundle
    from .captioner import Candidate, Caption, Captioner
    from .errors import BundleError, DatastoreError, EngineError, ImageError, ItuneError, SearchError
    from .retrieval.datastore import Datastore

_MODULES = {
    "Bundle": ".bundle",
    "BundleError": ".errors",
    "Candidate": ".captioner",
    "Caption": ".captioner",
    "Captioner": ".captioner",
    "Datastore": ".retrieval.datastore",
    "DatastoreError": ".errors",
    "EngineError": ".errors",
    "Explanation": ".attention.explanation",
    "ImageError": ".errors",
    "ItuneError": ".errors",
    "SearchError": ".errors",
    "draw_heatmap": ".attention.heatmap",
}
__all__ = [
    "Bundle",
    "BundleError",
    "Candidate",
    "Caption",
    "Captioner",
    "Datastore",
    "DatastoreError",
    "EngineError",
    "Explanation",
    "ImageError",
    "ItuneError",
    "SearchError",
    "draw_heatmap",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
