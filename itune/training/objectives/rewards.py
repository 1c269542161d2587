"""The reward of self-critical training, computed in a process of its own: CIDEr-D with the end of the caption.

The end counts as a last word of each sample and reference, as in the common implementations of SCST. Without it,
CIDEr-D has no reason to end a caption well: "a man on a" has the n-grams of "a man on a horse" but for the rarest, and
training would soon cut captions. What the model has not ended lacks the word.

Document frequencies are those of the training captions, so that a reward does not depend on the batch. This module
does without torch, since the process imports it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread

from ...metrics.cider import CiderD, DocumentFrequencies
from ...metrics.tokenize import count_ngrams, split_words
from ...runtime.errors import ItuneError

Rewards = list[list[float]]
"""[images, samples]."""
END = "\n"
"""The word that ends a caption; no other word has white space."""


class CaptionRewards:
    """CIDEr-D of captions against the references of their photos."""

    def __init__(self, references: Mapping[Path, Sequence[str]]) -> None:
        """`references`: by photo, all of the training set."""
        # As words, since the n-grams of all would take several gigabytes for COCO.
        self._words = {photo: [caption_words(each, True) for each in own] for photo, own in references.items()}
        self._frequencies = DocumentFrequencies(
            set().union(*map(count_ngrams, captions)) for captions in self._words.values()
        )

    def __call__(
        self, photos: Sequence[Path], samples: Sequence[Sequence[str]], ends: Sequence[Sequence[bool]]
    ) -> Rewards:
        """The rewards [images, samples] of `samples`; `ends` says which of them the model has ended."""
        cider = CiderD([self._words[photo] for photo in photos], self._frequencies)
        words = [list(map(caption_words, *photo)) for photo in zip(samples, ends, strict=True)]
        columns = [cider.per_image(column) for column in zip(*words, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]


def caption_words(caption: str, ended: bool) -> list[str]:
    """The words of a caption, with END if it is ended."""
    return [*split_words(caption), *[END] * ended]


class RewardsLostError(ItuneError):
    """The process that computes rewards is gone."""

    def __init__(self) -> None:
        super().__init__("the process that computes rewards was killed, perhaps out of memory: add --resume to go on")


class Rewarder:
    """Computes rewards in another process, which ends with this object."""

    def __init__(self, references: Mapping[Path, Sequence[str]]) -> None:
        """`references` as in `CaptionRewards`."""
        # A forked copy of a process with torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _prepare, (references,))
        with _blocking_signals():
            self._pool.submit(os.getpid)  # the first call starts the process

    def submit(
        self, photos: Sequence[Path], samples: Sequence[Sequence[str]], ends: Sequence[Sequence[bool]]
    ) -> Callable[[], Rewards]:
        """Start to compute what `CaptionRewards` returns; the result waits for it.

        Raises:
            RewardsLostError: the process was killed; by the result, too.
        """
        with _losing():
            future = self._pool.submit(_reward, photos, samples, ends)

        def result() -> Rewards:
            with _losing():
                return future.result()

        return result


@contextmanager
def _blocking_signals() -> Iterator[None]:
    """Signals that ask a program to end reach all its processes, but the step is to be finished: they stay blocked in a
    process that the block starts.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _losing() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise RewardsLostError from error


_prepared: list[CaptionRewards] = []  # in the process of a `Rewarder`


def _prepare(references: Mapping[Path, Sequence[str]]) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    _prepared.append(CaptionRewards(references))


def _end_with_parent() -> None:
    """A killed parent does not say goodbye."""
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        os._exit(1)


def _reward(photos: Sequence[Path], samples: Sequence[Sequence[str]], ends: Sequence[Sequence[bool]]) -> Rewards:
    return _prepared[0](photos, samples, ends)
