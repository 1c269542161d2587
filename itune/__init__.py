"""I-Tuning image captioning: train small adapters between a frozen CLIP and a frozen GPT-2, export, run.

`from itune import Captioner` needs neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runtime import Caption, Captioner, Explanation, ItuneError, draw_heatmap

__all__ = ["Caption", "Captioner", "Explanation", "ItuneError", "draw_heatmap"]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
