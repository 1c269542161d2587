"""The prompt that carries retrieved captions, the same in training and at run time.

As SmallCap's own code does, the prompt is tokenised by itself and the caption's tokens are joined to it. The template
ends with a space, so the prompt's last token is that space alone, and the caption begins with a bare word.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from ..errors import SearchError
from ..settings import RetrievalSettings, TextSettings


def clean_caption(text: str, settings: TextSettings) -> str:
    """A caption as the language model learns it: white space collapsed, case and final period as the settings say."""
    text = " ".join(text.split())
    if settings.lower:
        text = text.lower()
    return text.rstrip(" .") if settings.strip_period else text


def retrieval_prompt(settings: RetrievalSettings, captions: Sequence[str]) -> str:
    r"""The text before a caption: the template with `captions`, or what stands for none.

    >>> retrieval_prompt(settings, ["a dog runs", "a brown dog"])
    'Similar images show\n\na dog runs\n\na brown dog.\n\nThis image shows '
    """
    return settings.template.replace("{captions}", settings.separator.join(captions)) if captions else settings.empty


class PromptWriter:
    """Writes retrieval prompts as token ids."""

    def __init__(self, tokenizer: Tokenizer, text: TextSettings, settings: RetrievalSettings) -> None:
        """`text`: how the captions of the training data were cleaned; so are those of the datastore."""
        self.tokenizer, self.settings = tokenizer, settings
        # The template has the only period.
        self._text = text.model_copy(update={"strip_period": True})

    @property
    def shortest(self) -> int:
        """The fewest tokens that a prompt has."""
        return len(self._encode(self.settings.empty))

    def clean(self, caption: str) -> str:
        """A caption as it stands in a prompt: cleaned, and cut after `max_caption_tokens`."""
        caption = clean_caption(caption, self._text)
        most = self.settings.max_caption_tokens
        encoding = self.tokenizer.encode(caption, add_special_tokens=False)
        return caption if len(encoding.ids) <= most else caption[: encoding.offsets[most - 1][1]]

    def write(self, captions: Sequence[str], room: int) -> tuple[list[int], tuple[str, ...]]:
        """Token ids of the prompt, without the begin token, and the captions in it.

        The last captions, which are the least similar, are left out where the prompt would be longer than `room`
        tokens.

        Raises:
            SearchError: not even a prompt without captions has room.
        """
        cleaned = [self.clean(caption) for caption in captions]
        for count in range(len(cleaned), -1, -1):
            ids = self._encode(retrieval_prompt(self.settings, cleaned[:count]))
            if len(ids) <= room:
                return ids, tuple(captions[:count])
        raise SearchError(
            f"the retrieval prompt takes {len(ids)} tokens without any caption, where there is room for {room}: lower "
            "max_new_tokens, or use a language model with more positions"
        )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids
