"""Greedy search, beam search and sampling over an engine's candidates: the only search in the project.

It finds token for token what `transformers.generate` finds for each image alone, although the host never sees a whole
vocabulary. Samples come from the distribution that `transformers.generate` draws from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import Hypothesis, SearchConfig

if TYPE_CHECKING:
    from .core import NATIVE
    from .loop import PADDING, search

__all__ = ["NATIVE", "PADDING", "Hypothesis", "SearchConfig", "search"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import core, loop  # with NumPy, which the command lines' option models do without

    return getattr(core if name == "NATIVE" else loop, name)
