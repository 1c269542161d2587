"""The shortlist: which tokens a decoder keeps when `--vocabulary` cuts its embedding and its head down to them."""

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

from ..data.records import clean_caption, load_records
from ..runtime.bundle import TokenSettings
from ..runtime.engines.base import Int64
from ..runtime.errors import ItuneError
from ..runtime.settings import TextSettings
from ..training.batches import encode_caption, encode_text


@dataclass(frozen=True)
class Vocabulary:
    """What a shortlist is made from: the `size` most frequent tokens of `captions`, or every token of `lines`."""

    captions: tuple[str, ...] = ()
    size: int | None = None
    lines: tuple[str, ...] = ()

    @classmethod
    def read(cls, wanted: str, data: Path | None, split: str = "train") -> Self:
        """Understand `--vocabulary N|FILE`.

        N counts the captions of `split` in the caption file `data`. FILE is UTF-8 text, a word, a phrase or a
        caption a line.

        Raises:
            ItuneError: N without captions or not positive, or a FILE without text.
        """
        try:
            size = int(wanted)
        except ValueError:
            return cls(lines=_read_lines(Path(wanted)))
        if size < 1:
            raise ItuneError(f"--vocabulary {wanted}: give how many tokens to keep (at least 1), or a file of words")
        if data is None:
            raise ItuneError(f"--vocabulary {wanted}: name the captions whose tokens are counted with --data")
        records = load_records(data, split=split, check_images=False)
        return cls(tuple(chain.from_iterable(record.captions for record in records)), size)

    @property
    def sha256(self) -> str:
        """Two that make the same shortlist have the same."""
        text = "\n".join([str(self.size), *self.captions, *self.lines])
        return hashlib.sha256(text.encode()).hexdigest()

    def token_ids(self, tokenizer: Tokenizer, text: TextSettings, tokens: TokenSettings) -> Int64:
        """The ascending ids of the tokens to keep.

        Always among them: begin, prompt and end, and the tokens of single bytes, so that every text can still be
        written. Equally frequent tokens: the lower id.
        """
        if self.size is None:
            found = set()
            for line in self.lines:
                found.update(encode_caption(tokenizer, text, line))
                found.update(encode_text(tokenizer, f" {clean_caption(line, text)}"))  # as it stands within a caption
        else:
            counts: Counter[int] = Counter()
            for caption in self.captions:
                counts.update(encode_caption(tokenizer, text, caption))
            found = set(sorted(counts, key=lambda token: (-counts[token], token))[: self.size])
        single_bytes = (tokenizer.token_to_id(byte) for byte in ByteLevel.alphabet())
        always = {*tokens.text_prompt_tokens, tokens.end, *(token for token in single_bytes if token is not None)}
        return np.array(sorted(found | always), np.int64)


def _read_lines(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ItuneError(f"--vocabulary {path}: is neither a number nor a file that exists") from None
    except OSError as error:
        raise ItuneError(f"--vocabulary {path}: cannot be read ({error.strerror}); give a number or a file") from None
    except UnicodeDecodeError:
        raise ItuneError(f"--vocabulary {path}: is not UTF-8 text; give a word or a phrase a line") from None
    kept = tuple(line.strip() for line in lines if line.strip())
    if not kept:
        raise ItuneError(f"--vocabulary {path}: has no words in it; give a word or a phrase a line")
    return kept
