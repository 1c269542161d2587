"""The prompt with retrieved captions, the same in training and at run time.

As in SmallCap's own code, the prompt is tokenised by itself, and the caption's tokens are appended. The template ends
with a space, so the prompt's last token is that space alone, and the caption begins with a word without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer

from ..errors import BundleError, DatastoreError, SearchError
from ..settings import RetrievalSettings, TextSettings
from ..text import clean_caption, encode_text
from .datastore import Datastore

DEFAULT_DATASTORE = "datastore"
"""The default datastore: this folder in the bundle."""


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


@dataclass(frozen=True)
class Retriever:
    """Writes the prompts of images from their embeddings; without a datastore, prompts without captions."""

    writer: PromptWriter
    datastore: Datastore | None
    k: int

    @classmethod
    def load(
        cls,
        settings: RetrievalSettings | None,
        text: TextSettings,
        tokenizer: Tokenizer,
        *,
        model: Path,
        datastore: str | Path | None = None,
        k: int | None = None,
    ) -> Self | None:
        """The retriever of `model` (a bundle or checkpoint); None if nothing is retrieved.

        `datastore` None is the folder `datastore` in `model`. `k` None is the number of captions in the settings, or 4
        if `datastore` is given and the model was trained without retrieval. With k = 0, a model that was trained with
        retrieval gets the prompt of an empty datastore.

        Raises:
            BundleError: the model was not made for retrieval.
            DatastoreError: the datastore is missing, damaged, or was built with another encoder.
        """
        if settings is None:
            if k or datastore is not None:
                raise BundleError(f"{model} was not made for retrieval: export it with itune-export --retrieve")
            return None
        if k is None:
            k = settings.k or (RetrievalSettings.model_fields["k"].default if datastore is not None else 0)
        writer = PromptWriter(tokenizer, text, settings)
        if k == 0:
            return cls(writer, None, 0) if settings.k else None
        folder = Path(datastore or model / DEFAULT_DATASTORE)
        if not folder.exists():
            raise DatastoreError(
                f"{folder}: no such datastore; name one with --datastore, or take none with --retrieve 0"
            )
        return cls(writer, Datastore.load(folder, encoder=settings.encoder), k)

    def prompts(self, state: Any, room: int) -> tuple[list[list[int]], list[tuple[str, ...]]]:
        """For each image of an engine's `state`, its prompt (at most `room` token ids, without begin) and its captions.

        The captions are found by `state.embedding` [images, D], the vision graph's `visual.embedding`.
        """
        found = self.datastore.search(state.embedding, self.k) if self.datastore else [[]] * state.images
        written = [self.writer.write([each.caption for each in captions], room) for captions in found]
        return [ids for ids, _ in written], [captions for _, captions in written]
