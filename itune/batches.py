"""From records to what a training step reads: caption tokens, an epoch's order, padded batches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .config import TrainConfig
from .data import Record, clean_caption
from .runtime.errors import ItuneError
from .runtime.settings import TextSettings

_SIDED = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclass(frozen=True)
class TokenizedRecord:
    """A photo with its captions as token ids."""

    image: Path
    head: tuple[int, ...]
    """What stands before a caption, and is not scored: [prefix] [begin] [prompt]."""
    captions: tuple[tuple[int, ...], ...]
    """Each with its end token."""
    mirrorable: bool
    """No caption tells left from right."""


@dataclass(frozen=True)
class Batch:
    """Images that go through the model at once; rows are grouped by image, equally many each."""

    images: tuple[Path, ...]
    flip: tuple[bool, ...]
    input_ids: Tensor  # int64 [rows, T], right-padded
    mask: Tensor  # bool [rows, T]: tokens to be predicted

    @property
    def targets(self) -> int:
        """How many tokens the loss covers."""
        return int(self.mask.sum())


def special_token(tokenizer: Tokenizer, token: str, field: str) -> int:
    """The id of a special token of the text settings."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ItuneError(f"text.{field}: the language model's tokenizer.json has no token {token!r}")
    return found


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of plain text, without special tokens."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def encode_caption(tokenizer: Tokenizer, text: TextSettings, caption: str) -> list[int]:
    """Token ids of a caption as the language model learns it, without what comes before and after."""
    cleaned = clean_caption(caption, text)
    # GPT-2's pieces carry the space before a word: after a prompt a caption begins with one.
    return encode_text(tokenizer, f" {cleaned}" if text.prompt and not text.prompt[-1].isspace() else cleaned)


def tokenize(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    text: TextSettings,
    max_caption_tokens: int,
    prefix: Sequence[int] = (),
) -> list[TokenizedRecord]:
    """Captions as token ids, for `prefix` see `caption_head`; one cut at `max_caption_tokens` has no end token."""
    head = caption_head(tokenizer, text, prefix)
    end = special_token(tokenizer, text.end, "end")

    def encode(caption: str) -> tuple[int, ...]:
        ids = encode_caption(tokenizer, text, caption)
        return tuple([*ids, end] if len(ids) <= max_caption_tokens else ids[:max_caption_tokens])

    return [
        TokenizedRecord(
            record.image,
            tuple(head),
            tuple(encode(caption) for caption in record.captions),
            not any(_SIDED.search(caption) for caption in record.captions),
        )
        for record in records
    ]


def caption_head(tokenizer: Tokenizer, text: TextSettings, prefix: Sequence[int] = ()) -> list[int]:
    """The ids before a caption: [prefix] [begin] [prompt]; `prefix` are `CaptionModel.prefix_ids`."""
    begin = [] if text.begin is None else [special_token(tokenizer, text.begin, "begin")]
    return [*prefix, *begin, *encode_text(tokenizer, text.prompt)]


def make_batch(records: Sequence[TokenizedRecord], flip: Sequence[bool]) -> Batch:
    """Pad captions to one length, and images to one number of captions (with rows that nothing is scored in)."""
    per_image = max(len(record.captions) for record in records)
    length = max(map(_length, records))
    input_ids = np.zeros((len(records) * per_image, length), np.int64)
    mask = np.zeros(input_ids.shape, bool)
    for i, record in enumerate(records):
        for j, caption in enumerate(record.captions):
            row = i * per_image + j
            start, end = len(record.head), len(record.head) + len(caption)
            input_ids[row, :end] = (*record.head, *caption)
            mask[row, start:end] = True
    return Batch(
        tuple(record.image for record in records),
        tuple(flip),
        torch.from_numpy(input_ids),
        torch.from_numpy(mask),
    )


def _length(record: TokenizedRecord) -> int:
    return len(record.head) + max(map(len, record.captions))


def images_per_step(records: Sequence[TokenizedRecord], batch_size: int) -> int:
    """How many images make up `batch_size` captions."""
    captions = sum(len(record.captions) for record in records) / len(records)
    return max(1, min(len(records), round(batch_size / captions)))


def epoch_steps(records: Sequence[TokenizedRecord], config: TrainConfig, epoch: int) -> Iterator[list[Batch]]:
    """The optimiser steps of an epoch, each a list of batches; the same for the same seed and epoch.

    Within a step images are sorted by the length of their captions, which saves padding and changes nothing.
    """
    rng = np.random.default_rng([config.seed, epoch])
    order = rng.permutation(len(records))
    flips = rng.random(len(records)) < 0.5
    size = images_per_step(records, config.batch_size)
    for start in range(0, len(order), size):
        chosen = sorted(order[start : start + size], key=lambda i: (_length(records[i]), i), reverse=True)
        yield [
            make_batch(
                [records[i] for i in part],
                [config.flip and bool(flips[i]) and records[i].mirrorable for i in part],
            )
            for part in (
                chosen[at : at + config.images_per_forward] for at in range(0, len(chosen), config.images_per_forward)
            )
        ]


def steps_per_epoch(records: Sequence[TokenizedRecord], config: TrainConfig) -> int:
    """Optimiser steps in an epoch."""
    return -(-len(records) // images_per_step(records, config.batch_size))
