"""The prompt with retrieved captions, the same in training and at run time.

As in SmallCap's own code, the prompt is tokenised by itself, and the caption's tokens are appended. The template ends
with a space, so the prompt's last token is that space alone, and the caption begins with a word without one.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from ..errors import SearchError
from ..settings import RetrievalSettings, TextSettings
from ..text import clean_caption, encode_text


def retrieval_prompt(settings: RetrievalSettings, captions: Sequence[str]) -> str:
    r"""The text before a caption: the template with `captions`, or the prompt for none.

    >>> retrieval_prompt(settings, ["a dog runs", "a brown dog"])
    'Similar images show\n\na dog runs\n\na brown dog.\n\nThis image shows '
    """
    return settings.template.replace("{captions}", settings.separator.join(captions)) if captions else settings.empty


class PromptWriter:
    """Writes retrieval prompts as token ids."""

    def __init__(self, tokenizer: Tokenizer, text: TextSettings, settings: RetrievalSettings) -> None:
        """The datastore's captions are cleaned by `text`, as those of the training data were."""
        self.tokenizer, self.settings = tokenizer, settings
        # The only period is the template's.
        self._text = text.model_copy(update={"strip_period": True})

    @property
    def shortest(self) -> int:
        """Minimum length of a prompt in tokens."""
        return len(encode_text(self.tokenizer, self.settings.empty))

    def clean(self, caption: str) -> str:
        """A caption as it appears in a prompt: cleaned, and cut after `max_caption_tokens`."""
        caption = clean_caption(caption, self._text)
        most = self.settings.max_caption_tokens
        encoding = self.tokenizer.encode(caption, add_special_tokens=False)
        return caption if len(encoding.ids) <= most else caption[: encoding.offsets[most - 1][1]]

    def write(self, captions: Sequence[str], room: int) -> tuple[list[int], tuple[str, ...]]:
        """Token ids of the prompt, without the begin token, and the captions in it.

        Leaves out the last captions, which are the least similar, where the prompt would exceed `room` tokens.

        Raises:
            SearchError: there is no room even for a prompt without captions.
        """
        cleaned = [self.clean(caption) for caption in captions]
        for count in range(len(cleaned), -1, -1):
            ids = encode_text(self.tokenizer, retrieval_prompt(self.settings, cleaned[:count]))
            if len(ids) <= room:
                return ids, tuple(captions[:count])
        raise SearchError(
            f"the retrieval prompt without captions takes {len(ids)} tokens, but there is room for {room}: lower "
            "max_new_tokens, or use a language model with more positions"
        )
