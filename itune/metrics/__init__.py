"""Caption scores as papers report them: the arithmetic of the COCO caption evaluation code.

There is a module per metric, and all see the same words (`tokenize`). `score` gives CIDEr-D and BLEU; `evaluate` gives
all scores, intervals and tests. Scores keep that code's scale (CIDEr-D 1.167 where a paper prints 116.7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .cider import CiderD
from .evaluation import SCORES, Evaluation, compare_groups, evaluate
from .rouge import rouge_l
from .statistics import Difference
from .tokenize import tokenize

__all__ = [
    "SCORES",
    "CiderD",
    "Difference",
    "Evaluation",
    "Scores",
    "compare_groups",
    "evaluate",
    "rouge_l",
    "score",
    "tokenize",
]


@dataclass(frozen=True)
class Scores:
    """CIDEr-D (0 to 10) and BLEU-1 to 4 (0 to 1) of a corpus, and CIDEr-D by image id."""

    cider: float
    bleu: tuple[float, float, float, float]
    num_images: int
    per_image_cider: dict[str, float]


def score(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], *, tokenized: bool = False) -> Scores:
    """Compute CIDEr-D and BLEU of one caption per image; arguments and errors are those of `evaluate`."""
    found = evaluate(candidates, references, java=False, tokenized=tokenized)
    scores = found.scores()
    return Scores(
        cider=scores["cider"],
        bleu=(scores["bleu1"], scores["bleu2"], scores["bleu3"], scores["bleu4"]),
        num_images=len(candidates),
        per_image_cider=dict(zip(found.images, found.per_image()["cider"].tolist(), strict=True)),
    )
