"""What a captioner retrieves with: a datastore, how many captions, and the prompt that they become."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from ..bundle import Bundle
from ..engines.base import Float32
from ..errors import BundleError, DatastoreError, ItuneError
from ..settings import RetrievalSettings, TextSettings
from .datastore import MANIFEST, Datastore
from .prompts import PromptWriter

FOLDER = "datastore"
"""Where a bundle's datastore lies, unless another is named: beside `bundle.json`."""


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
        datastore: Path | None = None,
        k: int | None = None,
    ) -> Self | None:
        """The retriever of `model` (a bundle or checkpoint), None where nothing is retrieved.

        `datastore` None is the folder `datastore` in `model`. `k` None is that of the settings; but of a model that
        was trained without retrieval, 4 where a datastore is named. 0 gives a model that was trained with retrieval
        the prompt that stands for an empty datastore.

        Raises:
            DatastoreError: there is no datastore, or it is damaged or of another encoder.
            ItuneError: the model was not made for retrieval; k is below 0.
        """
        if k is not None and k < 0:
            raise ItuneError(f"retrieve must be at least 0, not {k}")
        if settings is None:
            if k or datastore is not None:
                raise BundleError(f"{model} was not made for retrieval: export it with itune-export --retrieve")
            return None
        if k is None:
            k = settings.k or (RetrievalSettings.model_fields["k"].default if datastore is not None else 0)
        writer = PromptWriter(tokenizer, text, settings)
        if k == 0:
            return cls(writer, None, 0) if settings.k else None
        folder = model / FOLDER if datastore is None else datastore
        if datastore is None and not (folder / MANIFEST).is_file():
            raise DatastoreError(
                f"{model} retrieves captions, and there is no datastore in {folder}: name one with --datastore "
                "(itune-datastore build makes it), or go without by --retrieve 0"
            )
        return cls(writer, Datastore.load(folder, encoder=settings.encoder), k)

    @classmethod
    def of_bundle(
        cls, bundle: Bundle, tokenizer: Tokenizer, datastore: Path | None = None, k: int | None = None
    ) -> Self | None:
        """The retriever of a bundle; see `load`."""
        manifest = bundle.manifest
        return cls.load(manifest.retrieval, manifest.text, tokenizer, model=bundle.folder, datastore=datastore, k=k)

    def prompts(
        self, embeddings: Float32 | None, images: int, room: int
    ) -> tuple[list[list[int]], list[tuple[str, ...]]]:
        """For each of `images`, its prompt (at most `room` token ids, without begin) and the captions in it.

        `embeddings` [images, D] are the vision graph's `visual.embedding`.
        """
        if self.datastore is None:
            found: list[list[str]] = [[]] * images
        elif embeddings is None:
            raise BundleError("the model's vision graph gives no visual.embedding to search by: export it again")
        else:
            found = [[each.caption for each in captions] for captions in self.datastore.search(embeddings, self.k)]
        written = [self.writer.write(captions, room) for captions in found]
        return [ids for ids, _ in written], [captions for _, captions in written]
