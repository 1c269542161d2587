"""Captions as the language model learns them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from itune.runtime.bundle import TOKENIZER, default_bundle
from itune.runtime.settings import TextSettings
from itune.runtime.text import clean_caption, encode_text, load_tokenizer


@pytest.mark.parametrize(
    ("caption", "rules", "expected"),
    [
        ("  A dog \t runs\n. ", {}, "A dog runs ."),
        ("A dog runs .", {"strip_period": True}, "A dog runs"),
        ("A Dog runs.", {"strip_period": True, "lower": True}, "a dog runs"),
        ("Mr. Dog, no. 5", {"strip_period": True}, "Mr. Dog, no. 5"),
        ("A DOG", {"lower": True}, "a dog"),
        (" . ", {"strip_period": True}, ""),
    ],
)
def test_clean_caption(caption: str, rules: dict[str, bool], expected: str) -> None:
    assert clean_caption(caption, TextSettings.model_validate(rules)) == expected


@settings(deadline=None)
@given(st.text(), st.builds(TextSettings, lower=st.booleans(), strip_period=st.booleans()))
def test_cleaning_twice_changes_nothing(caption: str, rules: TextSettings) -> None:
    cleaned = clean_caption(caption, rules)
    assert clean_caption(cleaned, rules) == cleaned
    assert cleaned == cleaned.strip()


def test_a_tokenizer_carries_no_state(tmp_path: Path) -> None:
    plain = load_tokenizer(default_bundle() / TOKENIZER)
    saved = Tokenizer.from_file(str(default_bundle() / TOKENIZER))
    saved.enable_truncation(3)
    saved.enable_padding(length=20)
    saved.model.dropout = 0.9
    saved.save(str(tmp_path / TOKENIZER))
    caption = "a dog runs across the grass"
    tokens = encode_text(load_tokenizer(tmp_path / TOKENIZER), caption)
    assert tokens == encode_text(plain, caption)
    assert plain.decode(tokens) == caption


def test_the_spelling_of_a_special_token_is_text() -> None:
    tokenizer = load_tokenizer(default_bundle() / TOKENIZER)
    end = tokenizer.token_to_id("<|endoftext|>")
    caption = "a dog<|endoftext|> runs"
    tokens = encode_text(tokenizer, caption)
    assert end not in tokens
    assert tokenizer.decode(tokens) == caption
