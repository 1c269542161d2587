"""From records to what a training step reads: caption tokens, an epoch's order, padded batches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..data.records import Record, clean_caption
from ..runtime.errors import ItuneError
from ..runtime.settings import TextSettings
from .config import TrainConfig

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
class Packing:
    """How a row holds one head and all captions of an image, so that the head is computed once for all of them.

    [head, caption 1, caption 2, ...]: a caption sees the head and itself, and its positions go on from the head's, so
    every token is computed from what it would be computed from in a row of its own.
    """

    positions: Tensor  # int64 [rows, T]
    segments: Tensor  # int64 [rows, T]: 0 the head, j caption j, -1 padding
    sources: Tensor  # int64 [rows, T]: the position from which a token is predicted

    def to(self, device: torch.device) -> Packing:
        """The same on a device."""
        return Packing(self.positions.to(device), self.segments.to(device), self.sources.to(device))

    def attention_mask(self) -> Tensor:
        """What attention scores gain [rows, 1, T, T]: 0 where a query sees a key, the lowest float elsewhere."""
        queries, keys = self.segments[:, :, None], self.segments[:, None, :]
        length = self.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=keys.device).tril()
        visible = causal & ((keys == 0) | (keys == queries))
        # Of bfloat16, so that it is finite under autocast, too.
        lowest = torch.finfo(torch.bfloat16).min
        return torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, lowest)[:, None]


@dataclass(frozen=True)
class Batch:
    """Images that go through the model at once; rows are grouped by image, equally many each."""

    images: tuple[Path, ...]
    flip: tuple[bool, ...]
    input_ids: Tensor  # int64 [rows, T], right-padded
    mask: Tensor  # bool [rows, T]: tokens to be predicted
    packing: Packing | None = None
    """Rows hold an image's captions one after the other; None: a row is a caption."""

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
    *,
    heads: Mapping[Path, Sequence[int]] | None = None,
    positions: int | None = None,
) -> list[TokenizedRecord]:
    """Captions as token ids; one that is cut at `max_caption_tokens` has no end token.

    `prefix`: see `caption_head`. `heads`: all that stands before the captions of each photo, where that differs.
    `positions`: how many the language model has; what they have no room for is cut, too.
    """
    usual = caption_head(tokenizer, text, prefix)
    end = special_token(tokenizer, text.end, "end")

    def encode(caption: str, most: int) -> tuple[int, ...]:
        ids = encode_caption(tokenizer, text, caption)
        return tuple([*ids, end] if len(ids) <= most else ids[:most])

    tokenized = []
    for record in records:
        head = tuple(usual if heads is None else heads[record.image])
        # The last token, the end, is predicted and not read.
        most = max_caption_tokens if positions is None else min(max_caption_tokens, positions - len(head))
        captions = tuple(encode(caption, most) for caption in record.captions)
        one_sided = any(_SIDED.search(caption) for caption in record.captions)
        tokenized.append(TokenizedRecord(record.image, head, captions, not one_sided))
    return tokenized


def caption_head(tokenizer: Tokenizer, text: TextSettings, prefix: Sequence[int] = ()) -> list[int]:
    """The ids before a caption: [prefix] [begin] [prompt]; `prefix` are `CaptionModel.prefix_ids`."""
    begin = [] if text.begin is None else [special_token(tokenizer, text.begin, "begin")]
    return [*prefix, *begin, *encode_text(tokenizer, text.prompt)]


def pack_batch(records: Sequence[TokenizedRecord], flip: Sequence[bool]) -> Batch:
    """One row for each image, with its head and all its captions (see `Packing`), padded to one length."""
    shape = (len(records), max(map(_packed_length, records)))
    input_ids, positions, sources = (np.zeros(shape, np.int64) for _ in range(3))
    segments = np.full(shape, -1)
    for row, record in enumerate(records):
        start = len(record.head)
        input_ids[row, :start] = record.head
        positions[row, :start] = np.arange(start)
        segments[row, :start] = 0
        for j, caption in enumerate(record.captions, 1):
            end = start + len(caption)
            input_ids[row, start:end] = caption
            positions[row, start:end] = len(record.head) + np.arange(len(caption))
            positions[row, end - 1] -= 1  # nothing is predicted from the last token, and it may be one too many
            segments[row, start:end] = j
            sources[row, start:end] = (len(record.head) - 1, *range(start, end - 1))
            start = end
    packing = Packing(*map(torch.from_numpy, (positions, segments, sources)))
    images = tuple(record.image for record in records)
    return Batch(images, tuple(flip), torch.from_numpy(input_ids), packing.segments > 0, packing)


def _packed_length(record: TokenizedRecord) -> int:
    return len(record.head) + sum(map(len, record.captions))


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


def epoch_steps(
    records: Sequence[TokenizedRecord], config: TrainConfig, epoch: int, *, pack: bool = False
) -> Iterator[list[Batch]]:
    """The optimiser steps of an epoch, each a list of batches; the same for the same seed and epoch.

    Within a step images are sorted by the length of their captions, which saves padding and changes nothing; nor does
    `pack` (see `Packing`), which is worth it where much stands before the captions.
    """
    length, batch = (_packed_length, pack_batch) if pack else (_length, make_batch)
    rng = np.random.default_rng([config.seed, epoch])
    order = rng.permutation(len(records))
    flips = rng.random(len(records)) < 0.5
    size = images_per_step(records, config.batch_size)
    for start in range(0, len(order), size):
        chosen = sorted(order[start : start + size], key=lambda i: (length(records[i]), i), reverse=True)
        yield [
            batch(
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
