"""The tokeniser against words that the COCO code's Java tokeniser printed for the same text (punctuation dropped)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune.data.records import load_records
from itune.metrics.java import UnavailableError
from itune.metrics.tokenize import PUNCTUATION, split_words
from tests.itune.metrics.java_oracle import ptb_lines

JAVA = [
    ("A man's dog can't jump; it won't.", "a man 's dog ca n't jump it wo n't"),
    ("I'm, we're, they've, he'll, she'd, y'all", "i 'm we 're they 've he 'll she 'd y' all"),
    ("I'd've couldn't've who'd", "i 'd 've could n't 've who 'd"),
    ("Don’t! It’s “curly”", "do n't it 's curly"),
    ("\"Hello,\" said the 'big' man", "hello said the big man"),
    ("(with a hat) [and] {braces}", "-lrb- with a hat -rrb- -lsb- and -rsb- -lcb- braces -rcb-"),
    ("A t-shirt costs $3.50 or 1,000 dollars, 50% off", "a t-shirt costs $ 3.50 or 1,000 dollars 50 % off"),
    ("at 3:30 p.m. on 5/6/2010", "at 3:30 p.m. on 5/6/2010"),
    ("10:30am 5.30pm 10am 3p.m. sun", "10:30 am 5.30 pm 10am 3p m. sun"),
    ("-5 +5 .5 1. 12:30:15 1,000,000.50", "-5 +5 .5 1 12:30:15 1,000,000.50"),
    ("3.5-inch 3,000-foot 5-year-old 1990-2000", "3.5-inch 3,000-foot 5-year-old 1990-2000"),
    ("Mr. Smith, St. Bernard vs. others etc.", "mr. smith st. bernard vs. others etc."),
    ("Jr. Dr. Jones of Pa. or a pa.", "jr. dr. jones of pa. or a pa"),
    ("the U.S. flag, a U.S.-based team", "the u.s. flag a u.s.-based team"),
    ("plan b. and plan c. The dog", "plan b. and plan c the dog"),
    ("No. 5 no. five No.5", "no. 5 no five no. 5"),
    ("The dogs' house. 'n' rock 'n' roll rock'n'roll", "the dogs house 'n' rock 'n' roll rock 'n' roll"),
    ("the '90s 1980's 20's", "the '90s 1980 's 20 's"),
    ("cannot gonna wanna gotta gimme lemme", "can not gon na wan na got ta gim me lem me"),
    ("'tis 'twas 'em 'cause", "'t is 't was 'em 'cause"),
    ("O'Brien's o'clock ma'am Hawai'i d'Angelo g'day", "o'brien 's o'clock ma'am hawai'i d'angelo g day"),
    ("wait... what?! really?? no!!! yes--no yes - no", "wait what ?! really ?? no !!! yes no yes no"),
    ("a – b a–b a—b … ----- -", "a b a b a b -----"),
    ("snow- covered -covered un-", "snow covered covered un"),
    ("AT&T R&B r&b black & white rock&roll", "at&t r&b r & b black & white rock & roll"),
    ("and/or black/white/red w/ w/o 1/2", "and/or black/white/red w / w/o 1/2"),
    ("4x4 2-wheeler 1st 5'10\" 6' 4\"", "4x4 2-wheeler 1st 5 10 6 4"),
    ("#5 #hashtag @home me@example.com.", "# 5 #hashtag @home me@example.com"),
    ("see http://example.com/a?b=c, www.example.com.", "see http://example.com/a?b=c www.example.com"),
    ("A man in a suit .A dog.Then a cat", "a man in a suit a dog.then a cat"),
    ("dog,cat dog;cat dog:cat dog.cat dog?cat", "dog cat dog cat dog cat dog.cat dog?cat"),
    ("£5 €5 5¢ 90° ½ cup US$5", "# 5 $ 5 5 cents 90 ° 1/2 cup us$ 5"),
    ("foo_bar __a__ a*b ** = < > <b>bold</b>", "foo_bar __ a __ a * b ** = < > <b> bold </b>"),
    ("AT&amp;T &lt; &quot;it&quot;", "at&t < it"),
    ("naïve café über 北京 Zoë’s cafe\u0301", "naïve café über 北京 zoë 's cafe\u0301"),
    ("hello😀 world ❤️ ★", "hello world ❤ ★"),
    ("soft\u00adhyphen zero\u200bwidth\ttab", "softhyphen zero width tab"),
    ("C++, C#; F#-sharp C++11 c#5 ABC++ A+", "c++ c# f# sharp c++ 11 c# 5 abc + + a +"),
    ("O’Neil’s d’Angelo l’eau Hawai’i o’clock y’all", "o’neil 's d’angelo l’eau hawai’i o’clock y’ all"),
    ("rock’n’roll ’n’ ’em ’90s ’tis the dogs’ ’ll", "rock ’n’ roll ’n’ ’em ’90s tis the dogs 'll"),
    ("IT’S g’day c’mon can’t’ve ‘hi’ ’ ‘", "it 's g 'd ay c 'm on ca n't 've hi"),
    ("7a.m. at 7 a.m. or 7p.m. sharp", "7a m. at 7 a.m. or 7p m. sharp"),
    ("x² 5°C 1½ m³", "x ² 5 ° c 1 1/2 m ³"),
    ("A dog  .  ", "a dog"),
    (". , ! ?", ""),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), JAVA)
def test_words_are_those_of_the_java_tokenizer(text: str, expected: str) -> None:
    assert split_words(text) == expected.split()


def test_java_still_says_so() -> None:
    try:
        words = ptb_lines([text for text, _ in JAVA if text.strip()])
    except UnavailableError as error:
        pytest.skip(str(error))
    assert words == [expected.split() for text, expected in JAVA if text.strip()]


@pytest.mark.slow
def test_words_of_all_captions(shared_data: Path) -> None:
    captions = [caption for record in load_records(shared_data / "flickr8k", split=None) for caption in record.captions]
    assert len(captions) > 30_000
    try:
        expected = ptb_lines(captions)
    except UnavailableError as error:
        pytest.skip(str(error))
    wrong = [text for text, words in zip(captions, expected, strict=True) if split_words(text) != words]
    assert wrong == []


def test_the_words_of_a_caption_do_not_depend_on_what_follows_it() -> None:
    # In the COCO code they do: it keeps "b." if the next caption in its file starts with "Two", not with "A".
    assert split_words("This is plan b.") == ["this", "is", "plan", "b"]


# Full of what the rules look for, so that more than the last rule is exercised.
fragments = st.lists(
    st.sampled_from([*"abnstAUS019'’.,:;-–—_/&@#$?!()[]<> \n\t", "n't", "'s", "http://", "Mr.", "U.S."])
)


@settings(deadline=None)
@given(st.one_of(st.text(), fragments.map("".join)))
def test_any_text_gives_words(text: str) -> None:
    tokens = split_words(text)
    assert " ".join(tokens).split() == tokens, "a word is empty or holds white space"
    assert not PUNCTUATION.intersection(tokens)
    assert all(token == token.lower() for token in tokens)


@settings(deadline=None)
@given(st.lists(st.from_regex("[a-z]{2,8}(-[a-z]{2,8})?", fullmatch=True).filter(lambda word: word != "cannot")))
def test_plain_words_stay(words: list[str]) -> None:
    compounds = {"cannot", "gonna", "wanna", "gotta", "gimme", "lemme"}
    words = [word for word in words if word not in compounds]
    assert split_words(" ".join(words)) == words
    assert split_words(" ".join(words).upper() + " .") == words
