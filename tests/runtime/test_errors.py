"""Messages are one printable line, whatever the names in them."""

from __future__ import annotations

import pytest

from itune.runtime.errors import ItuneError, printable, reading


def test_messages_cannot_reach_the_terminal_as_commands() -> None:
    name = "photo\n\x1b]0;title\x07\t\u202e\udc80.jpg"
    message = str(ItuneError(f"{name}: damaged"))
    assert message == "photo\\n\\x1b]0;title\\x07\\t\\u202e\\udc80.jpg: damaged"
    message.encode()


def test_long_messages_are_cut() -> None:
    assert len(str(ItuneError("x" * 100_000))) <= 1000


def test_words_of_every_script_stay() -> None:
    text = "Straße, दो कुत्ते, 犬 👩‍👩‍👧 e\u0301 Bildschirmfoto\u202f3\u3000.jpg"
    assert printable(text) == text


def test_reading_names_the_file() -> None:
    with pytest.raises(ItuneError) as error, reading("a\nb", ItuneError, "copy it again"):
        raise ValueError("line 1\nline 2")
    assert str(error.value) == "a\\nb: line 1; copy it again"
