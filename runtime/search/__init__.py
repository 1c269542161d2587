"""Greedy search, beam search and sampling over an engine's candidates: the only search in the project.

It finds token for token what `transformers.generate` finds for each image alone, although the host never sees a whole
vocabulary. Samples come from the distribution that `transformers.generate` draws from.
"""

from .config import Hypothesis, SearchConfig

__all__ = ["Hypothesis", "SearchConfig"]
