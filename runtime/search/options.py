"""Search options as a caller gives them: names and values to a checked `SearchConfig`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import Field, StringConstraints
from tokenizers import Tokenizer

from ..errors import SearchError, reading
from ..settings import SearchDefaults, Settings
from ..text import encode_text
from .config import SearchConfig


class BadWords(Settings):
    """`SearchConfig.bad_words` as words instead of tokens."""

    bad_words: Annotated[
        tuple[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)], ...],
        Field(description="Words that are never generated."),
    ] = ()


@dataclass(frozen=True)
class OptionReader:
    """Checks search options for one model. It needs no engine, and can be pickled."""

    defaults: SearchDefaults
    tokenizer: Tokenizer
    room: int
    """Most tokens of a caption: the positions that the prompt leaves."""

    def read(self, options: dict[str, Any], others: Iterable[str] = ()) -> SearchConfig:
        """`options` are the fields of `SearchConfig`, `bad_words` being a list of words; None stands for the default.

        The error for an unknown name suggests the nearest field, or one of `others`.

        Raises:
            SearchError: an unknown option, or options that contradict each other or the model.
        """
        fields = SearchConfig.model_fields
        if unknown := next((name for name in options if name not in fields), None):
            nearest = "".join(f"; did you mean {name}?" for name in get_close_matches(unknown, [*others, *fields], 1))
            raise SearchError(f"there is no option {unknown}{nearest}")
        chosen = {name: value for name, value in options.items() if value is not None}
        if chosen.get("do_sample"):
            chosen.setdefault("num_beams", 1)
        with reading("search options", SearchError):
            given = BadWords(bad_words=chosen.pop("bad_words", ()))
            # A word has other tokens at the start of a caption than after a space.
            words = sorted({space + word for word in given.bad_words for space in ("", " ")})
            banned = tuple(tuple(encode_text(self.tokenizer, word)) for word in words)
            config = SearchConfig(**(self.defaults.model_dump() | chosen), bad_words=banned)
        if config.max_new_tokens > self.room:
            raise SearchError(
                f"max_new_tokens must be at most {self.room}, not {config.max_new_tokens}: the prompt leaves no more "
                "positions (for a TensorRT plan, export again with a larger --max-new-tokens)"
            )
        return config
