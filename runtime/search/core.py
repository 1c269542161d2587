"""Which code carries the search between two steps of the engine: C++ where it was built, else its NumPy twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..engines.base import Candidates, Float32, Int64
from .config import SearchConfig
from .numpy_search import NumpySearch
from .numpy_top_k import numpy_top_k

try:
    import _itune_native
except ImportError:  # built without a compiler
    NATIVE = False
else:
    NATIVE = True


class Core(Protocol):
    """The state of one search. Not for two threads at once."""

    @property
    def k(self) -> int:
        """How many candidates of each row the next `advance` needs: never more than the vocabulary has."""
        ...

    def advance(self, logits: Float32, token_ids: Int64, logsumexp: Float32, /) -> tuple[Int64, Int64, Int64 | None]:
        """Take the candidates of every row (see `engines.base.Candidates`), decide how each goes on.

        Returns:
            tokens [rows, 1] and parents [rows] of the engine's next step, without the rows of images that are done;
            the images that go on [images], indices into the ones so far, or None if all do.

        Raises:
            SearchError: candidates that are too few, misshapen or not numbers; an image without any caption.
        """
        ...

    def captions(self) -> list[list[tuple[list[int], float]]]:
        """Tokens and score of every caption of each image; of images that are not done, none."""
        ...


MakeCore = Callable[[Int64, SearchConfig, int, int], Core]
"""Begin with prompts [images, length], left-padded with NO_TOKEN: (prompts, config, end_token, most_candidates)."""


def native_search(prompts: Int64, config: SearchConfig, end_token: int, most_candidates: int) -> Core:
    """The core in C++."""
    return _itune_native.Search(
        prompts,
        end_token=end_token,
        most_candidates=most_candidates,
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        length_penalty=config.length_penalty,
        stop_when_full=config.early_stopping is True,
        stop_never_early=config.early_stopping == "never",
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        repetition_penalty=config.repetition_penalty,
        bad_words=config.bad_words,
        do_sample=config.do_sample,
        rows_per_image=config.rows_per_image,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )


def top_k(logits: Float32, k: int) -> Candidates:
    """The `k` best of logits [rows, vocabulary] with the log-sum-exp of each row, equal ones by token id.

    For engines that hand over raw logits. A row with NaN or +inf gets a logsumexp that is not finite, which the
    search refuses; one of -inf throughout gets -inf.
    """
    return Candidates(*_itune_native.top_k(logits, k)) if NATIVE else numpy_top_k(logits, k)


make_core: MakeCore = native_search if NATIVE else NumpySearch
