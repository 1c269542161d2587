"""Greedy and beam search over an engine's candidates: the one search of the project.

Token for token what `transformers.generate(do_sample=False)` finds for each image alone, although the host
never sees a whole vocabulary.
"""

from __future__ import annotations

from .config import Hypothesis, SearchConfig
from .loop import search

__all__ = ["Hypothesis", "SearchConfig", "search"]
