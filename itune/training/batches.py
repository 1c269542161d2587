"""From records to the input of a training step: caption tokens, an epoch's order, padded batches."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..data.records import Record
from ..runtime.engines.base import Int64
from ..runtime.errors import ItuneError
from ..runtime.settings import TextSettings
from ..runtime.text import encode_caption, encode_text
from .config import TrainConfig

_SIDED = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclass(frozen=True)
class TokenizedRecord:
    """A photo with its captions as token ids."""

    image: Path
    prompt: tuple[int, ...]  # the tokens before a caption, which are not scored: [prefix] [begin] [prompt]
    captions: tuple[tuple[int, ...], ...]  # each with its end token
    mirrorable: bool  # no caption mentions left or right
    weight: float = 1.0  # as in `Record`


@dataclass(frozen=True)
class Packing:
    """The layout of rows [prompt, caption 1, caption 2, ...] that compute an image's prompt only once.

    A caption attends to the prompt and to itself, and its positions continue the prompt's, so every token is computed
    as in a row of its own.
    """

    positions: Tensor  # int64 [rows, T]
    segments: Tensor  # int64 [rows, T]: 0 the prompt, j caption j, -1 padding
    sources: Tensor  # int64 [rows, T]: the position from which a token is predicted

    def to(self, device: torch.device) -> Packing:
        """A copy on a device."""
        return Packing(self.positions.to(device), self.segments.to(device), self.sources.to(device))

    def attention_mask(self) -> Tensor:
        """Additive attention mask [rows, 1, T, T]: 0 where a query sees a key, the lowest float elsewhere."""
        queries, keys = self.segments[:, :, None], self.segments[:, None, :]
        length = self.segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=keys.device).tril()
        visible = causal & ((keys == 0) | (keys == queries))
        # Of bfloat16, so that it stays finite under autocast.
        lowest = torch.finfo(torch.bfloat16).min
        return torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, lowest)[:, None]


@dataclass(frozen=True)
class Batch:
    """Images that go through the model at once; rows are grouped by image, equally many for each."""

    records: tuple[TokenizedRecord, ...]
    flip: tuple[bool, ...]
    input_ids: Tensor  # int64 [rows, T], right-padded
    mask: Tensor  # bool [rows, T]: tokens to predict
    packing: Packing | None = None  # None: every row is one caption

    @property
    def images(self) -> tuple[Path, ...]:
        """The photos."""
        return tuple(record.image for record in self.records)

    def to(self, device: torch.device) -> Batch:
        """A copy on a device."""
        packing = None if self.packing is None else self.packing.to(device)
        return replace(self, input_ids=self.input_ids.to(device), mask=self.mask.to(device), packing=packing)

    @property
    def targets(self) -> int:
        """The number of tokens in the loss."""
        return int(self.mask.sum())


def special_token(tokenizer: Tokenizer, token: str, field: str) -> int:
    """The id of a special token of the text settings."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ItuneError(f"text.{field}: the language model's tokenizer has no token {token!r}")
    return found


def prompt_tokens(tokenizer: Tokenizer, text: TextSettings, prefix: Sequence[int] = ()) -> list[int]:
    """Token ids before a caption: [prefix] [begin] [prompt]; `prefix` are `CaptionModel.prefix_ids`."""
    begin = [] if text.begin is None else [special_token(tokenizer, text.begin, "begin")]
    return [*prefix, *begin, *encode_text(tokenizer, text.prompt)]


def tokenize(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    text: TextSettings,
    max_caption_tokens: int,
    prefix: Sequence[int] = (),
    *,
    prompts: Mapping[Path, Sequence[int]] | None = None,
    positions: int | None = None,
) -> list[TokenizedRecord]:
    """Captions as token ids; a caption cut at `max_caption_tokens` has no end token.

    `prefix` as in `prompt_tokens`. `prompts`: all tokens before a photo's captions, if photos differ. `positions`: the
    language model's; captions are cut to fit.
    """
    usual = prompt_tokens(tokenizer, text, prefix)
    end = special_token(tokenizer, text.end, "end")
    tokenized = []
    for record in records:
        prompt = tuple(usual if prompts is None else prompts[record.image])
        # The model predicts the last token but never reads it, so it needs no position.
        most = max_caption_tokens if positions is None else min(max_caption_tokens, positions - len(prompt))
        encoded = [encode_caption(tokenizer, text, caption) for caption in record.captions]
        captions = tuple(tuple([*ids, end] if len(ids) <= most else ids[:most]) for ids in encoded)
        one_sided = any(_SIDED.search(caption) for caption in record.captions)
        tokenized.append(TokenizedRecord(record.image, prompt, captions, not one_sided, record.weight))
    return tokenized


def pack_batch(records: Sequence[TokenizedRecord], flip: Sequence[bool]) -> Batch:
    """One row for each image, with its prompt and all its captions (`Packing`), padded to one length."""
    shape = (len(records), max(map(_packed_length, records)))
    input_ids, positions, sources = (np.zeros(shape, np.int64) for _ in range(3))
    segments = np.full(shape, -1)
    for row, record in enumerate(records):
        start = len(record.prompt)
        input_ids[row, :start] = record.prompt
        positions[row, :start] = np.arange(start)
        segments[row, :start] = 0
        for j, caption in enumerate(record.captions, 1):
            end = start + len(caption)
            input_ids[row, start:end] = caption
            positions[row, start:end] = len(record.prompt) + np.arange(len(caption))
            positions[row, end - 1] -= 1  # it predicts nothing, and may lie one position beyond the model's last
            segments[row, start:end] = j
            sources[row, start:end] = (len(record.prompt) - 1, *range(start, end - 1))
            start = end
    packing = Packing(*map(torch.from_numpy, (positions, segments, sources)))
    return Batch(tuple(records), tuple(flip), torch.from_numpy(input_ids), packing.segments > 0, packing)


def _packed_length(record: TokenizedRecord) -> int:
    return len(record.prompt) + sum(map(len, record.captions))


def make_batch(records: Sequence[TokenizedRecord], flip: Sequence[bool]) -> Batch:
    """One row for each caption, padded to one length, with unscored rows for images that have fewer captions."""
    per_image = max(len(record.captions) for record in records)
    length = max(map(_length, records))
    input_ids = np.zeros((len(records) * per_image, length), np.int64)
    mask = np.zeros(input_ids.shape, bool)
    for i, record in enumerate(records):
        for j, caption in enumerate(record.captions):
            row = i * per_image + j
            start, end = len(record.prompt), len(record.prompt) + len(caption)
            input_ids[row, :end] = (*record.prompt, *caption)
            mask[row, start:end] = True
    return Batch(tuple(records), tuple(flip), torch.from_numpy(input_ids), torch.from_numpy(mask))


def _length(record: TokenizedRecord) -> int:
    return len(record.prompt) + max(map(len, record.captions))


def epoch_size(records: Sequence[TokenizedRecord]) -> int:
    """How many photos an epoch draws, each as often as its weight says."""
    counts = Counter(record.weight for record in records)
    return sum(int(weight) * photos + _drawn_once_more(weight, photos) for weight, photos in counts.items())


def _drawn_once_more(weight: float, photos: int) -> int:
    """Of photos of one weight, how many are drawn for the weight's fraction; at least one."""
    return max(1, round(weight % 1 * photos)) if weight % 1 else 0


def _draw(records: Sequence[TokenizedRecord], rng: np.random.Generator) -> Int64:
    """An epoch's photos [epoch_size], as indices."""
    weights = np.array([record.weight for record in records])
    drawn = [np.repeat(np.arange(len(records)), weights.astype(int))]
    for weight in np.unique(weights[weights % 1 > 0]):
        alike = np.flatnonzero(weights == weight)
        drawn.append(rng.choice(alike, _drawn_once_more(weight, len(alike)), replace=False))
    return np.concatenate(drawn)


def images_per_step(records: Sequence[TokenizedRecord], batch_size: int) -> int:
    """The number of images that have `batch_size` captions on average."""
    captions = sum(record.weight * len(record.captions) for record in records)
    average = captions / sum(record.weight for record in records)
    return max(1, min(epoch_size(records), round(batch_size / average)))


def epoch_steps(
    records: Sequence[TokenizedRecord], config: TrainConfig, epoch: int, *, pack: bool = False
) -> Iterator[list[Batch]]:
    """The optimizer steps of an epoch, each a list of batches; the same for the same seed and epoch.

    Within a step, images are sorted by their number of captions, then by length, to save padding. `pack` puts each
    image's captions into one row (`Packing`) to save time with long prompts. Neither changes the result.
    """
    shape, batch = (_packed_length, pack_batch) if pack else (_shape, make_batch)
    rng = np.random.default_rng([config.seed, epoch])
    drawn = [records[i] for i in _draw(records, rng)]
    order = rng.permutation(len(drawn))
    flips = rng.random(len(drawn)) < 0.5
    mirrored = [config.flip and bool(flip) and record.mirrorable for flip, record in zip(flips, drawn, strict=True)]
    size, part = images_per_step(records, config.batch_size), config.images_per_forward
    for start in range(0, len(order), size):
        chosen = sorted(order[start : start + size], key=lambda i: (shape(drawn[i]), i), reverse=True)
        parts = [chosen[at : at + part] for at in range(0, len(chosen), part)]
        yield [batch([drawn[i] for i in indices], [mirrored[i] for i in indices]) for indices in parts]


def _shape(record: TokenizedRecord) -> tuple[int, int]:
    return len(record.captions), _length(record)


def steps_per_epoch(records: Sequence[TokenizedRecord], config: TrainConfig) -> int:
    """Optimizer steps in an epoch."""
    return -(-epoch_size(records) // images_per_step(records, config.batch_size))
