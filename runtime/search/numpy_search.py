"""The search's core in NumPy: for machines without a compiler, and the oracle that the C++ core is tested against."""

from __future__ import annotations

import numpy as np

from ..engines.base import Float32, Int64
from ..errors import SearchError
from . import beams, sampling
from .config import SearchConfig
from .processors import Float64, Processors


class NumpySearch:
    """The state of one search (see `core.Core`)."""

    def __init__(self, prompts: Int64, config: SearchConfig, end_token: int, most_candidates: int) -> None:
        self._config, self._end_token, self._most_candidates = config, end_token, most_candidates
        self._processors = Processors(config, end_token)
        self._beams = beams.Beams.start(prompts, config)
        self._running = np.arange(len(prompts))  # numbers of the images still present
        self._captions: list[list[tuple[list[int], float]]] = [[] for _ in prompts]
        self._find_constraints()

    def _find_constraints(self) -> None:
        self._constraints = self._processors.constraints(self._beams.rows, self._beams.generated)
        config = self._config
        untouched = (config.top_k or self._most_candidates) if config.do_sample else 2 * config.num_beams
        self.k = min(untouched + self._constraints.most_per_row(), self._most_candidates)

    def advance(self, logits: Float32, token_ids: Int64, logsumexp: Float32) -> tuple[Int64, Int64, Int64 | None]:
        """See `Core.advance`."""
        self._check(logits, token_ids, logsumexp)
        state = self._beams
        images, rows_per_image = state.scores.shape
        moves = self._move(*self._score(logits.astype(np.float64), token_ids, logsumexp), token_ids)
        kept = np.flatnonzero(~moves.done)
        if len(kept) < images:
            self._finish(np.flatnonzero(moves.done))
            self._running = self._running[kept]
            state.keep(kept)
        parents = kept[:, None] * rows_per_image + moves.parents[kept]
        self._find_constraints()
        return moves.tokens[kept].reshape(-1, 1), parents.reshape(-1), kept if len(kept) < images else None

    def captions(self) -> list[list[tuple[list[int], float]]]:
        """See `Core.captions`."""
        return self._captions

    def _check(self, logits: Float32, token_ids: Int64, logsumexp: Float32) -> None:
        rows = len(self._beams.rows)
        if logits.shape != token_ids.shape or len(logits) != rows or logsumexp.shape != (rows,):
            raise SearchError(f"The decoder must return logits, token ids and a logsumexp for each of {rows} rows.")
        if logits.shape[1] < self.k:
            raise SearchError(
                f"The decoder returned {logits.shape[1]} candidates a row, an exact search takes {self.k} here: let it "
                "return more."
            )
        # A NaN or +inf anywhere in the vocabulary shows in the logsumexp, among the candidates or not; NaN compares
        # false.
        if not ((logsumexp < np.inf).all() and (logits < np.inf).all()):
            raise SearchError(
                "The decoder returned logits that are not numbers (NaN or infinite): export it again, in fp32 if "
                "it was fp16 or quantised."
            )

    def _score(self, logits: Float64, token_ids: Int64, logsumexp: Float32) -> tuple[Float64, Float64]:
        """What the processors make of the candidates, and their log-probabilities before, both [rows, k].

        In float64, where adding a beam's score to two different logits does not make them equal.
        """
        # A row without any possible token has a logsumexp of -inf, and -inf - -inf is NaN.
        log_probs = logits - np.where(logsumexp > -np.inf, logsumexp, 0)[:, None]
        # transformers' processors see log-probabilities in beam search and raw logits elsewhere.
        seen = log_probs if self._config.num_beams > 1 else logits
        return self._processors.apply(seen, token_ids, self._constraints), log_probs

    def _move(self, processed: Float64, log_probs: Float64, token_ids: Int64) -> beams.Moves:
        config, state = self._config, self._beams
        if config.do_sample:
            shape = (*state.scores.shape, -1)
            rows = processed.reshape(shape), log_probs.reshape(shape)
            return sampling.draw(state, *rows, token_ids.reshape(shape), config, self._end_token)
        sums = state.scores.reshape(-1, 1)
        if config.num_beams > 1:
            ranks = scores = sums + processed
        else:
            ranks, scores = processed, sums + np.where(processed > -np.inf, log_probs, -np.inf)
        shape = (len(state.scores), -1)
        pools = ranks.reshape(shape), scores.reshape(shape)
        return beams.advance(state, *pools, token_ids.reshape(shape), config, self._end_token)

    def _finish(self, images: Int64) -> None:
        for image in images.tolist():
            number = int(self._running[image])
            captions = self._beams.captions(image)
            if not captions:
                raise SearchError(
                    f"No caption is possible for image {number}, every next token is forbidden after "
                    f"{self._beams.generated - 1}: loosen bad_words, no_repeat_ngram_size or min_new_tokens."
                )
            self._captions[number] = captions
