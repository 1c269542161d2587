"""Greedy and beam search and sampling over an engine's candidates: the one search of the project.

Token for token what `transformers.generate` finds for each image alone, although the host never sees a whole
vocabulary; samples come from the distribution that `transformers.generate` draws from.
"""

from __future__ import annotations

from .config import Hypothesis, SearchConfig
from .core import NATIVE, top_k
from .loop import PADDING, search

__all__ = ["NATIVE", "PADDING", "Hypothesis", "SearchConfig", "search", "top_k"]
