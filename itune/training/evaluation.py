"""The dev evaluation: scores of the captions of several dev sets, and a few sample captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from ..data.records import Record
from ..metrics import CiderD, split_words
from .advice import bad_endings

_SAMPLES = 4
"""Sample photos of each dev set."""


@dataclass(frozen=True)
class DevResult:
    """A dev evaluation."""

    metrics: dict[str, float]
    """`cider`: CIDEr-D, the mean of the sets' own; of several sets also `cider_NAME`; `bad_endings`: share of captions
    that end in the middle of a phrase."""
    samples: dict[str, str]
    """Captions of `DevSets.samples`."""


class DevSets:
    """The dev sets of a run, each with document frequencies of its own."""

    def __init__(self, sets: Mapping[str, Sequence[Record]]) -> None:
        self.images = [record.image for records in sets.values() for record in records]
        self.samples = {
            f"{name}/{Path(record.id).name}": record.image
            for name, records in sets.items()
            for record in records[:: -(-len(records) // _SAMPLES)]
        }
        """A few photos spread over each set, by the set's name and their id."""
        self._ciders = {
            name: CiderD([list(map(split_words, record.references)) for record in records])
            for name, records in sets.items()
        }
        self._sizes = list(map(len, sets.values()))

    def result(self, captions: Sequence[str]) -> DevResult:
        """Score a caption of each photo, in the order of `images`."""
        words = iter(map(split_words, captions))
        scores = {
            name: cider.score([next(words) for _ in range(size)])
            for (name, cider), size in zip(self._ciders.items(), self._sizes, strict=True)
        }
        each = {f"cider_{name}": score for name, score in scores.items()} if len(scores) > 1 else {}
        metrics = {"cider": fmean(scores.values()), **each, "bad_endings": bad_endings(captions)}
        found = dict(zip(self.images, captions, strict=True))
        return DevResult(metrics, {name: found[image] for name, image in self.samples.items()})
