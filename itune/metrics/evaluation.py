"""Score captions by CIDEr-D, BLEU-1 to 4, METEOR, ROUGE-L and SPICE, as far as this machine can compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..runtime.errors import ItuneError
from .bleu import bleu
from .cider import CiderD
from .java import UnavailableError
from .meteor import meteor
from .rouge import rouge_l
from .spice import spice
from .statistics import Difference, Floats, Metric, bootstrap, compare, holm, interval, mean_metric
from .tokenize import Pair, split_words

SCORES = ("cider", "bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_l", "spice")
"""Every score, in the order in which papers list them."""
ALPHA = 0.05
"""The significance level of a whole comparison: the chance of a difference between equally good captioners."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The scores of a set of captions; `missing` maps scores that could not be computed to the reason.

    Scores keep the COCO code's scale: CIDEr-D from 0 to 10, the others from 0 to 1.
    """

    images: tuple[str, ...]
    metrics: tuple[Metric, ...]
    missing: dict[str, str]
    pairs: tuple[Pair, ...] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """The names of the computed scores, in the order of `metrics`."""
        return [name for metric in self.metrics for name in metric.names]

    def scores(self) -> dict[str, float]:
        """Return the corpus scores."""
        return dict(zip(self.names, np.concatenate([m.scores() for m in self.metrics]).tolist(), strict=True))

    def per_image(self) -> dict[str, Floats]:
        """Return each image's scores, [images] each; corpus BLEU and METEOR are not their means."""
        return dict(zip(self.names, np.concatenate([m.per_image() for m in self.metrics], 1).T, strict=True))

    def intervals(self, *, samples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Return 95 % intervals of the scores on other images of the same kind (bootstrap over images)."""
        bounds = interval(bootstrap(self.metrics, samples=samples, seed=seed))
        return {name: (float(low), float(high)) for name, (low, high) in zip(self.names, bounds, strict=True)}

    def select(self, images: Sequence[str]) -> Evaluation:
        """Evaluate a subset of the images, with its own document frequencies in CIDEr-D."""
        place = {image: row for row, image in enumerate(self.images)}
        rows = [place[image] for image in images]
        pairs = tuple(self.pairs[row] for row in rows)
        metrics = tuple(_cider(pairs) if m.names == ("cider",) else m.select(rows) for m in self.metrics)
        return Evaluation(tuple(images), metrics, self.missing, pairs)


def evaluate(
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    java: bool = True,
    split: Callable[[str], list[str]] = split_words,
) -> Evaluation:
    """Score one caption per image against its references, both by image id, by every score available here.

    Only the references of captioned images count. Without `java`, METEOR and SPICE are left out. `split` turns a
    caption into words.

    Raises:
        ItuneError: nothing to score, or an image has no list of references.
    """
    missing_references = sorted(i for i in candidates if not references.get(i) or isinstance(references[i], str))
    if missing_references or not candidates:
        raise ItuneError(
            f"{len(missing_references)} of {len(candidates)} captioned images have no reference captions (the first: "
            f"{missing_references[:1]}): score captions against the split that they belong to"
        )
    pairs = tuple((split(text), list(map(split, references[image]))) for image, text in candidates.items())
    metrics = [_cider(pairs), bleu(pairs)]
    missing = {}
    for name, compute in (("meteor", meteor), ("spice", spice)):
        if not java:
            missing[name] = "left out, as it needs Java"
            continue
        try:
            metrics.append(compute(pairs))
        except UnavailableError as error:
            missing[name] = str(error)
    metrics.append(mean_metric("rouge_l", [rouge_l(*pair) for pair in pairs]))
    metrics.sort(key=lambda metric: SCORES.index(metric.names[0]))
    return Evaluation(tuple(candidates), tuple(metrics), missing, pairs)


def compare_groups(
    first: Mapping[str, Evaluation], second: Mapping[str, Evaluation], *, seed: int = 0
) -> dict[str, dict[str, Difference]]:
    """Compare two captioners on the same groups of images, with p-values corrected for all groups and scores."""
    found = {}
    for group, evaluation in first.items():
        # Java may have failed on one side.
        both = set(evaluation.names) & set(second[group].names)
        a, b = ([m for m in side.metrics if m.names[0] in both] for side in (evaluation, second[group]))
        found[group] = compare(a, b, seed=seed)
    places = [(group, name) for group, differences in found.items() for name in differences]
    for (group, name), p in zip(places, holm([found[group][name].p for group, name in places]), strict=True):
        found[group][name] = replace(found[group][name], p_holm=p, significant=p < ALPHA)
    return found


def _cider(pairs: Sequence[Pair]) -> Metric:
    cider = CiderD([references for _, references in pairs])
    return mean_metric("cider", cider.per_image([candidate for candidate, _ in pairs]))
