"""The search's core in NumPy: for machines without a compiler, and the oracle that the C++ core is tested against.

The logits processors of transformers are applied to an engine's k candidates instead of the whole vocabulary. This is
exact because every processor only lowers scores (a ban, or a repetition penalty of at least 1). A row asks for
k = 2 * num_beams + (tokens that can be lowered), so at least 2 * num_beams of its candidates keep their scores. A token
that the engine did not return had no higher logit than those (or the same logit and a higher id), and its score can
only have fallen. It is not among the row's 2 * num_beams best, and the search looks no further.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..engines.base import Float32, Int64
from .config import SearchConfig
from .sampling import Float64, choose, uniform

NO_TOKEN = -1
"""Left padding of prompts."""
Scored = tuple[list[int], float]
"""The tokens of a caption, and its length-normalised score."""


@dataclass
class _Beam:
    """A running beam or sample."""

    history: list[int]  # prompt and generated tokens
    score: float  # sum of log-probabilities; -inf marks a beam that does not exist (transformers uses -1e9)
    banned: list[int] = field(default_factory=list)  # tokens that may not follow


@dataclass
class _Image:
    number: int
    prompt_length: int
    beams: list[_Beam]  # one until the first step (all would be the same prompt), then `config.rows_per_image`
    finished: list[Scored]  # of beams: best first; of samples: one place each


class NumpySearch:
    """The state of one search between two steps of the engine. Not thread-safe."""

    k: int
    """How many candidates of each row the next `advance` needs, at most `most_candidates`."""

    def __init__(self, prompts: Int64, config: SearchConfig, end_token: int, most_candidates: int) -> None:
        """`prompts` [images, length], left-padded with NO_TOKEN; `most_candidates` as in `Engine`."""
        self._config, self._end_token, self._most_candidates = config, end_token, most_candidates
        # As in transformers, the end token alone is never a bad word, but a sequence may end with it.
        self._bad_words = {*config.bad_words} - {(end_token,)}
        self._captions: list[list[Scored]] = [[] for _ in prompts]
        self._images = []
        for number, row in enumerate(prompts):
            prompt = row[row != NO_TOKEN].tolist()
            places = config.rows_per_image if config.do_sample else 0
            self._images.append(_Image(number, len(prompt), [_Beam(prompt, 0.0)], [([], -np.inf)] * places))
        self._generated = 0
        self._find_banned()

    def advance(self, logits: Float32, token_ids: Int64, logsumexp: Float32) -> tuple[Int64, Int64, Int64 | None]:
        """Choose the next token of every row from its candidates (see `engines.base.Candidates`).

        Returns:
            tokens [rows, 1] and parents [rows] for the engine's next step, without the rows of finished images;
            the images that continue [images], as indices into the current ones, or None if all do.
        """
        # In float64, adding a beam's score to two different logits does not make them equal. A row without any
        # possible token has a logsumexp of -inf, and -inf - -inf is NaN.
        log_probs = logits.astype(np.float64) - np.where(logsumexp > -np.inf, logsumexp, 0)[:, None]
        # transformers' processors see log-probabilities in beam search and raw logits elsewhere.
        processed = log_probs.copy() if self._config.num_beams > 1 else logits.astype(np.float64)
        for row, beam in enumerate(beam for image in self._images for beam in image.beams):
            self._process(processed[row], token_ids[row].tolist(), beam)
        self._generated += 1
        tokens, parents, kept, first = [], [], [], 0
        for place, image in enumerate(self._images):
            rows = slice(first, first + len(image.beams))
            move = self._draw_samples if self._config.do_sample else self._move_beams
            before, sources = image.beams, move(image, processed[rows], log_probs[rows], token_ids[rows])
            image.beams = [_Beam([*before[s].history, token], score) for s, token, score in sources]
            if self._is_done(image):
                self._captions[image.number] = [each for each in image.finished if each[1] > -np.inf]
            else:
                kept.append(place)
                tokens += [[token] for _, token, _ in sources]
                parents += [first + source for source, _, _ in sources]
            first = rows.stop
        all_kept = len(kept) == len(self._images)
        self._images = [self._images[place] for place in kept]
        self._find_banned()
        moves = np.array(tokens, np.int64).reshape(-1, 1), np.array(parents, np.int64)
        return *moves, None if all_kept else np.array(kept, np.int64)

    def captions(self) -> list[list[Scored]]:
        """Tokens and score of every caption of each finished image; an empty list for the others."""
        return self._captions

    def _find_banned(self) -> None:
        """Set each beam's `banned` tokens, and `k` so that enough candidates keep their scores."""
        config, lowered = self._config, 0
        for beam in (beam for image in self._images for beam in image.beams):
            beam.banned = self._banned(beam.history)
            penalised = len(beam.history) if config.repetition_penalty != 1 else 0
            lowered = max(lowered, len(beam.banned) + penalised)
        unchanged = (config.top_k or self._most_candidates) if config.do_sample else 2 * config.num_beams
        self.k = min(unchanged + lowered, self._most_candidates)

    def _banned(self, history: list[int]) -> list[int]:
        """The tokens that may not follow: minimum length, n-grams that may not repeat, bad words."""
        banned = [self._end_token] if self._generated < self._config.min_new_tokens else []
        if size := self._config.no_repeat_ngram_size:
            starts, last = range(len(history) + 1 - size), history[len(history) + 1 - size :]
            banned += [history[i + size - 1] for i in starts if history[i : i + size - 1] == last]
        for *prefix, token in self._bad_words:
            if len(prefix) <= len(history) and history[len(history) - len(prefix) :] == prefix:
                banned.append(token)
        return banned

    def _process(self, scores: Float64, token_ids: list[int], beam: _Beam) -> None:
        """Lower the scores [k] of a row's candidates in place: repetition penalty, then banned tokens."""
        penalty = self._config.repetition_penalty
        if penalty != 1:
            seen = _places(beam.history, token_ids)
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        scores[_places(beam.banned, token_ids)] = -np.inf

    def _move_beams(
        self, image: _Image, processed: Float64, log_probs: Float64, token_ids: Int64
    ) -> list[tuple[int, int, float]]:
        """Beam, token and score of each new beam: one turn of `_beam_search` (or `_sample`, greedily) of transformers.

        `processed`, `log_probs`, `token_ids` [beams, k]. Where transformers decides to stop for a whole batch, each
        image here decides for itself. Ties: lower beam, then lower token id.
        """
        num_beams = self._config.num_beams
        sums = np.array([[beam.score] for beam in image.beams])
        ranks = scores = sums + processed
        if num_beams == 1:
            ranks, scores = processed, sums + np.where(processed > -np.inf, log_probs, -np.inf)
        # Each beam ends at most once, so of twice as many candidates num_beams can continue.
        width = 2 * num_beams if num_beams > 1 else 1
        source = np.repeat(np.arange(len(sums)), token_ids.shape[1])
        best = np.lexsort((token_ids.ravel(), source, -ranks.ravel()))[:width]
        found = [(int(source[i]), int(token_ids.flat[i]), float(scores.flat[i])) for i in best]
        found += [(*found[-1][:2], -np.inf)] * (width - len(found))  # in a vocabulary smaller than `width`
        running, stopped = [], []
        for place, (beam, token, score) in enumerate(found):
            ends = token == self._end_token or self._generated == self._config.max_new_tokens
            if not ends and score > -np.inf:
                running.append((beam, token, score))
                continue
            stopped.append((beam, token, -np.inf))
            if ends and place < num_beams and score > -np.inf:  # an end beyond the num_beams best does not count
                image.finished.append(self._caption(image, image.beams[beam], token, score))
        image.finished.sort(key=lambda caption: -caption[1])  # stable: of equals, the one that finished earlier
        del image.finished[num_beams:]
        return [*running, *stopped][:num_beams]

    def _draw_samples(
        self, image: _Image, processed: Float64, log_probs: Float64, token_ids: Int64
    ) -> list[tuple[int, int, float]]:
        """Beam, token and score of each sample; a finished or impossible one continues as end tokens of score -inf."""
        config, drawn = self._config, []
        for sample in range(config.rows_per_image):
            row = sample if len(image.beams) > 1 else 0
            beam, token, score = image.beams[row], self._end_token, -np.inf
            if beam.score > -np.inf:
                choice = self.choose(processed[row], token_ids[row], sample)
                if choice is not None:
                    token = int(token_ids[row, choice])
                    score = beam.score + float(log_probs[row, choice])
                    if token == self._end_token or self._generated == config.max_new_tokens:
                        image.finished[sample] = self._caption(image, beam, token, score)
                        score = -np.inf
            drawn.append((row, token, score))
        return drawn

    def choose(self, logits: Float64, token_ids: Int64, sample: int) -> int | None:
        """The index of the candidate that continues a sample; None if no candidate is possible."""
        return choose(logits, token_ids, self._config, uniform(self._config.seed, sample, self._generated - 1))

    def _caption(self, image: _Image, beam: _Beam, last: int, score: float) -> Scored:
        """The caption that a beam becomes with its last token."""
        tokens = beam.history[image.prompt_length :] + ([] if last == self._end_token else [last])
        return tokens, score / float(self._generated) ** self._config.length_penalty

    def _is_done(self, image: _Image) -> bool:
        """Whether no better caption can follow: `_check_early_stop_heuristic` of transformers."""
        config = self._config
        if config.do_sample:
            return all(beam.score == -np.inf for beam in image.beams)
        full = len(image.finished) == config.num_beams
        if full and config.early_stopping is True:
            return True
        longest = config.early_stopping == "never" and config.length_penalty > 0
        length = config.max_new_tokens if longest else self._generated
        reachable = image.beams[0].score / float(length) ** config.length_penalty
        return not reachable > (image.finished[-1][1] if full else -np.inf)


def _places(tokens: list[int], token_ids: list[int]) -> list[int]:
    """The places of `tokens` in `token_ids`; faster than np.isin for as few as these."""
    wanted = set(tokens)
    return [place for place, token in enumerate(token_ids) if token in wanted] if wanted else []
