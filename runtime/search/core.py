"""The search between two steps of the engine: in C++ where the extension was built, else in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..engines.base import Float32, Int64
from .config import SearchConfig
from .numpy_search import NumpySearch

try:
    import _itune_native
except ImportError:  # built without a compiler
    NATIVE = False
else:
    NATIVE = True


class Core(Protocol):
    """The state of one search. Not thread-safe."""

    @property
    def k(self) -> int:
        """How many candidates of each row the next `advance` needs; at most the size of the vocabulary."""
        ...

    def advance(self, logits: Float32, token_ids: Int64, logsumexp: Float32, /) -> tuple[Int64, Int64, Int64 | None]:
        """Choose the next token of every row from the candidates that `search` checked (see `engines.base.Candidates`).

        Returns:
            tokens [rows, 1] and parents [rows] for the engine's next step, without the rows of finished images;
            the images that continue [images], as indices into the current ones, or None if all do.
        """
        ...

    def captions(self) -> list[list[tuple[list[int], float]]]:
        """Tokens and score of every caption of each finished image; an empty list for the others."""
        ...


MakeCore = Callable[[Int64, SearchConfig, int, int], Core]
"""(prompts [images, length], left-padded with NO_TOKEN; config; end_token; most_candidates) -> Core."""

make_core: MakeCore = _itune_native.Search if NATIVE else NumpySearch
