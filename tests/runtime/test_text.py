"""Captions as the language model learns them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune.runtime.settings import TextSettings
from itune.runtime.text import clean_caption


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
