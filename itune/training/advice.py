"""What a user should know about a run: too little data, captions that do not fit, captions that are all alike."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from ..data.records import Record
from ..metrics import split_words
from .batches import TokenizedRecord
from .config import TrainConfig

STEPS_PER_EPOCH = 20
"""A smaller batch is used rather than fewer optimizer steps."""
FEW_PHOTOS = 1000
"""With fewer training photos, captions mostly repeat phrases of the training captions."""
FEW_CAPTIONS = 10
"""So few captions say nothing about a captioner."""
FEW_DISTINCT = 0.5
"""Share of different captions below which a captioner hardly looks at its photos."""
MOST_TOKENS_PER_WORD = 2.5
MOST_BAD_ENDINGS = 0.05
"""Share of captions that end in the middle of a phrase, above which a captioner cuts them."""
_UNFINISHED = re.compile(
    "a|an|the|and|or|but|nor|while|as|because|that|which|who|whose|than|of|at|to|for|from|with|by|in|on|into|onto|upon|"
    "under|over|near|beside|besides|between|behind|beyond|among|against|across|through|during|before|after|above|below|"
    "along|around|toward|towards|within|without"
)
"""English articles, conjunctions and prepositions, after which a caption goes on."""


def fitting_batch_size(config: TrainConfig, train: Sequence[Record]) -> int:
    """The batch size in captions, reduced so that an epoch has about STEPS_PER_EPOCH steps or more."""
    captions = int(sum(record.weight * len(record.captions) for record in train))
    return max(1, min(config.batch_size, captions // STEPS_PER_EPOCH))


def data_advice(
    train: Sequence[Record], records: Sequence[TokenizedRecord], tokenizer: Tokenizer, end: int
) -> list[str]:
    """Sentences about the training data; `records` are those of `train` as token ids, which end with `end`."""
    found = []
    if len(train) < FEW_PHOTOS:
        found.append(
            f"{len(train)} training photos are few: below about {FEW_PHOTOS:,}, captions repeat phrases of the "
            "training captions, and adapters that start from nothing may give most photos the same one; continue from "
            "trained adapters with --init-from"
        )
    tokens = [caption for record in records for caption in record.captions]
    cut = sum(caption[-1] != end for caption in tokens)
    if cut:
        found.append(f"{cut} of {len(tokens)} captions are cut at --max-caption-tokens, and teach no end")
    words = sum(len(caption.split()) for record in train for caption in record.captions)
    per_word = sum(map(len, tokens)) / max(1, words) - len(tokens) / max(1, words)
    if per_word > MOST_TOKENS_PER_WORD:
        sample = tokens[:200]
        pieces = sum("\ufffd" in tokenizer.decode([token]) for caption in sample for token in caption)
        share = pieces / sum(map(len, sample))
        found.append(
            f"the language model's tokenizer needs {per_word:.1f} tokens a word for these captions, and {share:.0%} of "
            "the tokens are parts of a character: it was made for another language; choose a --language-model of "
            "theirs"
        )
    return found


def bad_endings(captions: Sequence[str]) -> float:
    """The share of captions whose last word is an English article, preposition or conjunction."""
    last = [words[-1] if (words := split_words(caption)) else "" for caption in captions]
    return sum(map(bool, map(_UNFINISHED.fullmatch, last))) / max(1, len(last))


def caption_advice(captions: Sequence[str]) -> list[str]:
    """Sentences about the dev captions, if many are the same or end badly."""
    found: list[str] = []
    if len(captions) < FEW_CAPTIONS:
        return found
    if len(set(captions)) / len(captions) < FEW_DISTINCT:
        most = max(set(captions), key=captions.count)
        found.append(
            f"only {len(set(captions))} different captions for {len(captions)} dev photos; the most frequent: {most!r}"
        )
    if (share := bad_endings(captions)) > MOST_BAD_ENDINGS:
        example = next(caption for caption in captions if bad_endings([caption]))
        found.append(f"{share:.0%} of the dev captions end in the middle of a phrase, such as {example!r}")
    return found
