from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer

from itune.runtime.errors import SearchError
from itune.runtime.retrieval.prompts import PromptWriter, retrieval_prompt
from itune.runtime.settings import EncoderIdentity, RetrievalSettings, TextSettings
from itune.runtime.text import clean_caption
from tests.conftest import make_tokenizer

ENCODER = EncoderIdentity(source="tower", sha256="a" * 64, pooling="mean", dim=4)
SETTINGS = RetrievalSettings(encoder=ENCODER)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_the_prompt_equals_smallcaps() -> None:
    assert retrieval_prompt(SETTINGS, ["one", "two", "three", "four"]) == (
        "Similar images show\n\none\n\ntwo\n\nthree\n\nfour.\n\nThis image shows "
    )
    assert retrieval_prompt(SETTINGS, []) == "This image shows "
    for template in ("This image shows ", "{captions}{captions}"):
        with pytest.raises(ValidationError) as error:
            RetrievalSettings(encoder=ENCODER, template=template)
        assert error.value.errors()[0]["loc"] == ("template",)


def test_captions_are_cleaned_as_in_training_and_lose_their_period(tokenizer: Tokenizer) -> None:
    writer = PromptWriter(tokenizer, TextSettings(lower=True), SETTINGS)
    ids, kept = writer.write(["A  Dog runs .", "Two Men."], 500)
    assert tokenizer.decode(ids) == "Similar images show\n\na dog runs\n\ntwo men.\n\nThis image shows "
    assert kept == ("A  Dog runs .", "Two Men.")
    assert PromptWriter(tokenizer, TextSettings(), SETTINGS).clean("A  Dog runs .") == "A Dog runs"
    assert clean_caption("A  Dog runs .", TextSettings()) == "A Dog runs ."


def test_the_prompt_and_the_caption_are_tokenised_apart(tokenizer: Tokenizer) -> None:
    ids, _ = PromptWriter(tokenizer, TextSettings(), SETTINGS).write(["a dog"], 500)
    assert ids[-1] == tokenizer.token_to_id("Ġ")  # GPT-2's space, which a joint tokenisation would put before a word


def test_long_captions_are_cut(tokenizer: Tokenizer) -> None:
    writer = PromptWriter(tokenizer, TextSettings(), SETTINGS.model_copy(update={"max_caption_tokens": 6}))
    cut = writer.clean("A man in a blue shirt is riding a bicycle .")
    assert "A man in a blue shirt is riding a bicycle".startswith(cut)
    assert len(tokenizer.encode(cut).ids) == 6
    assert writer.clean("A dog") == "A dog"
    assert writer.clean("ö" * 20) == "ööö"  # two bytes each


def test_the_last_captions_are_left_out_if_there_is_no_room(tokenizer: Tokenizer) -> None:
    writer = PromptWriter(tokenizer, TextSettings(), SETTINGS)
    captions = ["a dog", "two men", "a cat"]
    lengths = [len(writer.write(captions[:n], 500)[0]) for n in range(4)]
    assert lengths[0] == writer.shortest
    for n in range(1, 4):
        assert writer.write(captions, lengths[n])[1] == tuple(captions[:n])
    assert writer.write(captions, lengths[1] - 1)[1] == ()
    with pytest.raises(SearchError) as error:
        writer.write(captions, lengths[0] - 1)
    assert f"{lengths[0]} tokens" in str(error.value)
    assert f"room for {lengths[0] - 1}" in str(error.value)


def test_cuts_where_the_last_token_ends(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    writer = PromptWriter(tokenizer, TextSettings(), SETTINGS.model_copy(update={"max_caption_tokens": 2}))
    assert writer.clean("Three people are") == tokenizer.decode(tokenizer.encode("Three people are").ids[:2])
