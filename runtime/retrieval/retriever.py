"""Retrieval for a captioner: a datastore, how many captions to take, and the prompt that they become."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer

from ..errors import BundleError
from ..settings import RetrievalSettings, TextSettings
from .datastore import Datastore
from .prompts import PromptWriter

FOLDER = "datastore"
"""The default datastore: a folder in the bundle."""


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
        return cls(writer, Datastore.load(datastore or model / FOLDER, encoder=settings.encoder), k)

    def prompts(self, state: Any, room: int) -> tuple[list[list[int]], list[tuple[str, ...]]]:
        """For each image of an engine's `state`, its prompt (at most `room` token ids, without begin) and its captions.

        The captions are found by `state.embedding` [images, D], the vision graph's `visual.embedding`.
        """
        found = self.datastore.search(state.embedding, self.k) if self.datastore else [[]] * state.images
        written = [self.writer.write([each.caption for each in captions], room) for captions in found]
        return [ids for ids, _ in written], [captions for _, captions in written]
