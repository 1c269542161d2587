"""Greedy search, beam search and sampling over an engine's candidates: the only search in the project.

It finds token for token what `transformers.generate` finds for each image alone, although the host never sees a whole
vocabulary. Samples come from the distribution that `transformers.generate` draws from.
"""

from __future__ import annotations

from .config import Hypothesis, SearchConfig
from .core import NATIVE
from .loop import PADDING, search

__all__ = ["NATIVE", "PADDING", "Hypothesis", "SearchConfig", "search"]
