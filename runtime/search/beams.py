"""One step of greedy and beam search in NumPy: what `native/` does in C++, and is held against.

The state is a handful of plain arrays over all images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..engines.base import Bool, Int64
from .config import SearchConfig
from .processors import NO_TOKEN, Float64


@dataclass
class Beams:
    """The running beams (or samples) and the finished captions of some images.

    `beams` below is 1 until the first step (every beam would be the same prompt) and `config.rows_per_image` from
    then on. transformers marks what does not exist with a score of -1e9, here it is -inf: a beam or a caption that
    stayed empty, because too few tokens were possible, never turns into a result.
    """

    history: Int64  # [images, beams, prompt + generated], left-padded with NO_TOKEN
    scores: Float64  # [images, beams]: sums of log-probabilities, best first; of samples, in the order of drawing
    finished_tokens: Int64  # [images, rows_per_image, max_new_tokens], padded with NO_TOKEN
    finished_scores: Float64  # [images, rows_per_image]: length-normalised, in the same order
    generated: int = 0

    @classmethod
    def start(cls, prompts: Int64, config: SearchConfig) -> Beams:
        """Begin with `prompts` [images, length], left-padded with NO_TOKEN."""
        images, rows = len(prompts), config.rows_per_image
        return cls(
            history=prompts[:, None],
            scores=np.zeros((images, 1)),
            finished_tokens=np.full((images, rows, config.max_new_tokens), NO_TOKEN, np.int64),
            finished_scores=np.full((images, rows), -np.inf),
        )

    @property
    def rows(self) -> Int64:
        """The histories as the engine's rows, [images * beams, length]."""
        return self.history.reshape(-1, self.history.shape[-1])

    def keep(self, images: Int64) -> None:
        """Drop every image but `images`."""
        self.history = self.history[images]
        self.scores = self.scores[images]
        self.finished_tokens = self.finished_tokens[images]
        self.finished_scores = self.finished_scores[images]

    def captions(self, image: int) -> list[tuple[list[int], float]]:
        """The finished captions of an image as (tokens, score): the best first, or in the order of drawing."""
        return [
            (tokens[tokens != NO_TOKEN].tolist(), float(score))
            for tokens, score in zip(self.finished_tokens[image], self.finished_scores[image], strict=True)
            if score > -np.inf
        ]


class Moves(NamedTuple):
    """What every image does next."""

    tokens: Int64  # [images, rows_per_image]
    parents: Int64  # [images, rows_per_image]: the beam of the same image that each new beam continues
    done: Bool  # [images]


def advance(
    beams: Beams, ranks: Float64, scores: Float64, token_ids: Int64, config: SearchConfig, end_token: int
) -> Moves:
    """Give every beam its next token, bringing `beams` up to date.

    `ranks`, `scores`, `token_ids` [images, beams * k]: of all candidates of an image, what decides between them
    and the summed log-probability that the beam would have with them.

    This is one turn of `_beam_search` (with one beam: of `_sample`) in transformers, run on one image at a
    time: there the images of a batch meet in the decision to stop, here each image decides for itself.
    Ties: lower beam, then lower token id; among finished captions the one that finished earlier.
    """
    images, num_beams = len(beams.scores), config.num_beams

    # Twice as many candidates as beams: each beam ends at most once, so num_beams of them can go on.
    width = 2 * num_beams if num_beams > 1 else 1
    source = np.repeat(np.arange(beams.scores.shape[1]), ranks.shape[1] // beams.scores.shape[1])
    best = np.lexsort((token_ids, np.broadcast_to(source, ranks.shape), -ranks))[:, :width]
    missing = width - best.shape[1]
    if missing > 0:  # a vocabulary smaller than that
        best = np.pad(best, ((0, 0), (0, missing)), mode="edge")
    image = np.arange(images)[:, None]
    scores, token_ids, parents = scores[image, best], token_ids[image, best], source[best]
    if missing > 0:
        scores[:, -missing:] = -np.inf

    beams.generated += 1
    ended = token_ids == end_token
    if beams.generated == config.max_new_tokens:
        ended = np.ones_like(ended)
    finishing = ended[:, :num_beams]  # beyond the num_beams best, an end does not count
    if finishing.any():
        _finish(beams, finishing, scores, token_ids, parents, config, end_token)

    scores[ended] = -np.inf
    running = np.argsort(scores == -np.inf, axis=1, kind="stable")[:, :num_beams]
    token_ids, parents = token_ids[image, running], parents[image, running]
    beams.scores = scores[image, running]
    beams.history = np.concatenate([beams.history[image, parents], token_ids[:, :, None]], axis=2)
    return Moves(token_ids, parents, _done(beams, config))


def _finish(
    beams: Beams,
    finishing: Bool,
    scores: Float64,
    token_ids: Int64,
    parents: Int64,
    config: SearchConfig,
    end_token: int,
) -> None:
    """Merge the candidates marked in `finishing` [images, num_beams] into the finished captions."""
    num_beams, generated = config.num_beams, beams.generated
    image = np.arange(len(scores))[:, None]
    last = token_ids[:, :num_beams]
    tokens = np.full_like(beams.finished_tokens, NO_TOKEN)
    if generated > 1:
        tokens[:, :, : generated - 1] = beams.history[image, parents[:, :num_beams], 1 - generated :]
    tokens[:, :, generated - 1] = np.where(last == end_token, NO_TOKEN, last)
    normalised = scores[:, :num_beams] / float(generated) ** config.length_penalty
    merged_scores = np.concatenate([beams.finished_scores, np.where(finishing, normalised, -np.inf)], axis=1)
    merged_tokens = np.concatenate([beams.finished_tokens, tokens], axis=1)
    best = np.argsort(-merged_scores, axis=1, kind="stable")[:, :num_beams]
    beams.finished_scores, beams.finished_tokens = merged_scores[image, best], merged_tokens[image, best]


def _done(beams: Beams, config: SearchConfig) -> Bool:
    """Which images have nothing left to gain: `_check_early_stop_heuristic` of transformers."""
    longest = config.early_stopping == "never" and config.length_penalty > 0
    length = config.max_new_tokens if longest else beams.generated
    reachable = beams.scores[:, 0] / float(length) ** config.length_penalty
    worst = beams.finished_scores[:, -1]  # -inf as long as fewer than num_beams captions are finished
    done: Bool = ~(reachable > worst)
    if config.early_stopping is True:
        done |= worst > -np.inf
    return done
