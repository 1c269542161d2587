"""The shortlist: the tokens a decoder keeps when `--vocabulary` cuts its embedding and its head."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from ..data.records import load_records
from ..runtime.bundle import TokenSettings
from ..runtime.engines.base import Int64
from ..runtime.errors import ItuneError, reading
from ..runtime.settings import TextSettings
from ..runtime.text import clean_caption
from ..training.batches import encode_caption, encode_text


@dataclass(frozen=True)
class Vocabulary:
    """The source of a shortlist: the `size` most frequent tokens of `captions`, or every token of `lines`."""

    captions: tuple[str, ...] = ()
    size: int | None = None
    lines: tuple[str, ...] = ()

    @classmethod
    def read(cls, wanted: str, data: Path | None) -> Self:
        """Read `--vocabulary N|FILE`: N counts the train split of `data`; FILE has a word or phrase on each line.

        Raises:
            ItuneError: N is below 1 or has no captions, or FILE is not UTF-8 text with words.
        """
        if wanted.removeprefix("-").isdecimal():
            records = load_records(data, split="train", check_images=False) if data else []
            found = cls(tuple(chain.from_iterable(record.captions for record in records)), int(wanted))
        else:
            with reading(wanted, mend="--vocabulary takes a number, or a UTF-8 file with a word on each line"):
                lines = map(str.strip, Path(wanted).read_text(encoding="utf-8").splitlines())
                found = cls(lines=tuple(filter(None, lines)))
        if not found.lines and (not found.captions or int(wanted) < 1):
            raise ItuneError(
                f"--vocabulary {wanted}: needs a file with words, or at least 1 token and the captions to count: --data"
            )
        return found

    @property
    def sha256(self) -> str:
        """The same for all vocabularies that make the same shortlist."""
        text = "\n".join([str(self.size), *self.captions, *self.lines])
        return hashlib.sha256(text.encode()).hexdigest()

    def token_ids(self, tokenizer: Tokenizer, text: TextSettings, tokens: TokenSettings) -> Int64:
        """The ascending ids of the tokens to keep; of equally frequent tokens, those with the lower id.

        Begin, prompt and end tokens and all single bytes are always kept, so that any text can be written.
        """
        counts = Counter(
            token for caption in self.captions or self.lines for token in encode_caption(tokenizer, text, caption)
        )
        for line in self.lines:
            counts.update(encode_text(tokenizer, f" {clean_caption(line, text)}"))  # as in the middle of a caption
        kept = sorted(counts, key=lambda token: (-counts[token], token))[: self.size]
        single_bytes = (tokenizer.token_to_id(byte) for byte in ByteLevel.alphabet())
        always = [*tokens.text_prompt_tokens, tokens.end, *(token for token in single_bytes if token is not None)]
        return np.unique(np.array([*kept, *always], np.int64))
