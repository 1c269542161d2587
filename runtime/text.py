"""Captions as token ids and back, the same in training and at run time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from .settings import TextSettings


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` and make it stateless (see `stateless`)."""
    return stateless(Tokenizer.from_file(str(path)))


def stateless(tokenizer: Tokenizer) -> Tokenizer:
    """Make a tokenizer depend on the text alone, and return it.

    transformers saves the truncation and padding of its last call in `tokenizer.json`, and BPE dropout is random. In
    text, the spelling of a special token such as "<|endoftext|>" is text.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def clean_caption(text: str, settings: TextSettings) -> str:
    """A caption as the language model learns it: white space collapsed, case and final period as in the settings."""
    text = " ".join(text.split())
    if settings.lower:
        text = text.lower()
    return text.rstrip(" .") if settings.strip_period else text


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of plain text, without special tokens."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def encode_caption(tokenizer: Tokenizer, settings: TextSettings, caption: str) -> list[int]:
    """Token ids of a caption as the language model learns it, without begin, prompt and end."""
    cleaned = clean_caption(caption, settings)
    # GPT-2's tokens include the space before a word: after a prompt a caption begins with one.
    after_prompt = settings.prompt and not settings.prompt[-1].isspace()
    return encode_text(tokenizer, f" {cleaned}" if after_prompt else cleaned)


def decode_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of token ids, without special tokens and with white space collapsed."""
    return " ".join(tokenizer.decode(list(tokens), skip_special_tokens=True).split())
