"""Caption scores as papers report them: the arithmetic of the COCO caption evaluation code.

One module for each metric; all of them see the same words (`tokenize`). `score` is what training looks at, `evaluate`
what papers print, with intervals and tests. Scores keep that code's own scale (CIDEr-D 1.167 where a paper has 116.7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .bleu import Bleu, corpus_bleu
from .cider import CiderD, check_references, check_same_images
from .evaluation import SCORES, Evaluation, compare_groups, evaluate
from .rouge import rouge_l
from .statistics import Difference
from .tokenize import tokenize, words

__all__ = [
    "SCORES",
    "CiderD",
    "Difference",
    "Evaluation",
    "Scores",
    "compare_groups",
    "corpus_bleu",
    "evaluate",
    "rouge_l",
    "score",
    "tokenize",
]


@dataclass(frozen=True)
class Scores:
    """CIDEr-D and BLEU of a corpus: `cider` from 0 to 10, `bleu` 1 to 4 from 0 to 1; `per_image_cider` by image id."""

    cider: float
    bleu: Bleu
    num_images: int
    per_image_cider: dict[str, float]


def score(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], *, tokenized: bool = False) -> Scores:
    """Score one caption per image against its references, both by image id.

    Only the references of the captioned images count, also for CIDEr-D's document frequencies. `tokenized` captions are
    split at white space, others by `tokenize`. Raises ItuneError where a captioned image has no references.
    """
    check_same_images(candidates, references.keys() & candidates.keys())
    references = check_references({image: references[image] for image in candidates})
    candidate_words = {image: words(caption, tokenized=tokenized) for image, caption in candidates.items()}
    reference_words = {
        image: [words(caption, tokenized=tokenized) for caption in captions] for image, captions in references.items()
    }
    cider = CiderD({image: [" ".join(r) for r in refs] for image, refs in reference_words.items()}, tokenized=True)
    per_image = cider.per_image({image: " ".join(tokens) for image, tokens in candidate_words.items()})
    return Scores(
        cider=sum(per_image.values()) / len(per_image),
        bleu=corpus_bleu((candidate_words[image], reference_words[image]) for image in candidates),
        num_images=len(candidates),
        per_image_cider=per_image,
    )
