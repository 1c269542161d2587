"""`Captioner`: images in, captions out. It joins an engine, the search, a tokenizer and the preprocessing.

Nothing here knows which engine runs: a bundle's graphs and the eager PyTorch reference are driven alike.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from tokenizers import Tokenizer

from .bundle import DEFAULT, TOKENIZER, Bundle, TokenSettings
from .engines.base import Engine
from .errors import BundleError, ImageError, ItuneError, SearchError, reason
from .image import Source, decode, preprocess
from .pipeline import decode_ahead
from .retrieval.retriever import Retriever
from .search import PADDING, SearchConfig, search
from .settings import ImageSettings, SearchDefaults

if TYPE_CHECKING:
    from .attention.explanation import Explainer, Explanation, Layer

ENGINES = ("auto", "tensorrt", "onnxruntime-cuda", "onnxruntime")
"""The fastest that can run the bundle here; TensorRT plans; ONNX Runtime on a GPU; ONNX Runtime on the CPU."""
MAX_WORKERS = 4
"""Threads that decode images, unless more are asked for; each may hold a large photo in memory."""
MOST = 4096
"""Threads, workers, or images in a batch."""
T = TypeVar("T", bound=Source)


class _Decoded(NamedTuple):
    pixels: NDArray[np.uint8]
    ms: float


@dataclass(frozen=True)
class Candidate:
    """One of the captions that the search kept."""

    caption: str
    score: float


@dataclass(frozen=True)
class Timings:
    """Milliseconds spent on one image; a batch's time is divided evenly over its images."""

    decode_image: float
    encode: float
    search: float


@dataclass(frozen=True)
class Caption:
    """What an image shows, in the words of the first candidate."""

    caption: str
    score: float
    """Sum of the tokens' log-probabilities / their number ** length_penalty."""
    tokens: tuple[int, ...]
    """Token ids of `caption`, without the begin, prompt and end tokens."""
    candidates: tuple[Candidate, ...]
    """The captions of all beams, best first, or the samples in the order of drawing; the first is `caption`."""
    ms: Timings
    retrieved: tuple[str, ...] | None = None
    """The datastore's captions in the prompt, the most similar first; None where nothing is retrieved."""


class Captioner:
    """Captions images with one loaded model.

    >>> captioner = Captioner.load()
    >>> captioner.caption("photo.jpg").caption
    'a dog runs across the grass'
    """

    def __init__(
        self,
        engine: Engine[Any],
        tokenizer: Tokenizer,
        image: ImageSettings,
        tokens: TokenSettings,
        search: SearchDefaults,
        workers: int = 1,
        engine_name: str = "",
        engine_notice: str | None = None,
        retriever: Retriever | None = None,
        bundle: Bundle | None = None,
        threads: int | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.image = image
        self.tokens = tokens
        self.search = search
        self.workers = workers
        self.engine_name = engine_name
        """Which of ENGINES runs the model."""
        self.engine_notice = engine_notice
        """What is worth telling about how "auto" chose it, as a sentence; None if nothing is."""
        self.retriever = retriever
        """Where captions for the prompts come from; None where prompts have none."""
        self.bundle = bundle
        """What was loaded; None for a model that is no bundle, such as a checkpoint in PyTorch."""
        self.threads = threads
        """Of the engine; None is its choice."""
        self._explainer: Explainer | None = None
        self._loading = threading.Lock()

    @classmethod
    def load(
        cls,
        folder: str | Path | None = None,
        *,
        engine: str = "auto",
        threads: int | None = None,
        datastore: str | Path | None = None,
        retrieve: int | None = None,
    ) -> Captioner:
        """Load a bundle: `folder`, or the model that is installed with the package.

        `engine` is one of ENGINES; `threads` None lets the engine choose. A bundle that was made for retrieval takes
        `retrieve` captions (None: as many as it was trained with; 0: none) of `datastore` into each prompt; left out,
        of the folder `datastore` in the bundle.

        Raises:
            BundleError: the bundle is missing, damaged or of another schema version, or not made for retrieval.
            DatastoreError: the datastore is missing, damaged or of another encoder.
            EngineError: the engine cannot run here; with "auto", a bundle of TensorRT plans where there is no GPU.
        """
        if engine not in ENGINES:
            raise ItuneError(f"engine must be one of {', '.join(ENGINES)}, not {engine!r}")
        if threads is not None:
            _check_count("threads", threads, 1)
        bundle = Bundle.load(DEFAULT if folder is None else Path(folder))
        path = bundle.path(TOKENIZER)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more specific
            raise BundleError(f"{path} is not a tokenizer ({error}); export the bundle again") from error
        retriever = Retriever.of_bundle(bundle, tokenizer, None if datastore is None else Path(datastore), retrieve)
        # Slow to import: only once the bundle is good.
        from .engines.choice import load_engine
        from .engines.onnxruntime import available_cpus

        manifest = bundle.manifest
        loaded = load_engine(bundle, engine, threads)
        # The thread that runs the model decodes, too, while it would wait.
        workers = min(MAX_WORKERS, (threads or available_cpus()) - 1)
        return cls(
            loaded.engine,
            tokenizer,
            manifest.image,
            loaded.tokens,
            manifest.search,
            workers,
            loaded.name,
            loaded.notice,
            retriever,
            bundle,
            threads,
        )

    @overload
    def caption(self, images: T, *, batch_size: int = 8, workers: int | None = None, **options: Any) -> Caption: ...

    @overload
    def caption(
        self,
        images: list[T] | tuple[T, ...],
        *,
        batch_size: int = 8,
        workers: int | None = None,
        **options: Any,
    ) -> list[Caption]: ...

    def caption(
        self,
        images: T | list[T] | tuple[T, ...],
        *,
        batch_size: int = 8,
        workers: int | None = None,
        **options: Any,
    ) -> Caption | list[Caption]:
        """Caption one image, or each image of a list.

        An image is a path, an encoded file's bytes, a Pillow image or an array (see `image.decode`). Several
        threads may share a Captioner. See `stream` for `batch_size` and `workers`.

        Raises:
            ImageError: an image cannot be decoded; `stream` goes on with the others.
            SearchError: the options contradict each other or the model.
        """
        if isinstance(images, list | tuple):
            results = self.stream(images, batch_size=batch_size, workers=workers, **options)
            return [_raise_error(result) for _, result in results]
        return _raise_error(next(self.stream([images], batch_size=1, workers=0, **options))[1])

    def stream(
        self,
        images: Iterable[T],
        *,
        batch_size: int = 8,
        workers: int | None = None,
        **options: Any,
    ) -> Iterator[tuple[T, Caption | ImageError]]:
        """Caption images as they come, in order; a bad image yields its error and stops nothing.

        While `batch_size` images go through the model together, `workers` threads decode the next files; None is
        one fewer than the engine has threads, and MAX_WORKERS at most. At most 2 * batch_size images are
        taken ahead of what was yielded, and without workers batch_size: memory does not grow with their number. What
        `images` raises comes after the captions of what it gave before.
        """
        _check_count("batch_size", batch_size, 1)
        workers = self.workers if workers is None else workers
        _check_count("workers", workers, 0)
        return self._stream(images, batch_size, workers, self._config(options))

    @property
    def explainer(self) -> Explainer:
        """What `explain` reads attention with, loaded once it is asked for; raises as that does."""
        with self._loading:
            if self._explainer is None:
                if self.bundle is None:
                    raise ItuneError("attention is read from a bundle, and this model is none: export it first")
                from .attention.explanation import Explainer

                self._explainer = Explainer.load(self.bundle, self.tokenizer, self.threads)
            return self._explainer

    def explain(
        self,
        image: Source,
        caption: Caption | str | None = None,
        *,
        layer: Layer = "last",
        **options: Any,
    ) -> Explanation:
        """What the adapters look at while the model writes a caption of an image: a heatmap for every token.

        The caption is the search's, with `options`, unless `caption` is given: a result, or a text of yours that the
        model is made to write. Either way its tokens go through the decoder once, on the CPU, whichever engine
        captions: the bundle's ONNX graphs are loaded for it on the first call. `layer` is a decoder layer with an
        adapter, "last" of them, or their "mean". `draw_heatmap` makes a figure of the result.

        Raises:
            ImageError: the image cannot be decoded.
            BundleError: nothing in the bundle shows attention (TensorRT plans alone, a method without adapters), or
                it does not tell where its visual tokens lie in the image.
            ItuneError: there is no adapter on `layer`, or the model cannot write `caption`.
        """
        explainer = self.explainer
        explainer.reader.choose(layer)
        photo, config = decode(image), self._config(options)
        if caption is None:
            caption = self.caption(photo, **options)
        tokens = explainer.encode(caption) if isinstance(caption, str) else caption.tokens
        if self.retriever is None:
            return explainer.explain(photo, tokens, layer)
        return explainer.explain(photo, tokens, layer, lambda state: self.prompts(state, config)[0][0])

    def _stream(
        self, images: Iterable[T], batch_size: int, workers: int, config: SearchConfig
    ) -> Iterator[tuple[T, Caption | ImageError]]:
        with closing(decode_ahead(images, self._decode, batch_size=batch_size, workers=workers)) as batches:
            for batch in batches:
                good = [image for _, image in batch if not isinstance(image, ImageError)]
                captions = iter(self._caption_batch(good, config) if good else ())
                for source, image in batch:
                    yield source, image if isinstance(image, ImageError) else next(captions)
                del batch  # first let go of its images

    def _decode(self, source: Source) -> _Decoded | ImageError:
        start = perf_counter()
        try:
            pixels = preprocess(decode(source), self.image)
        except ImageError as error:
            return error
        return _Decoded(pixels, 1000 * (perf_counter() - start))

    def _caption_batch(self, images: list[_Decoded], config: SearchConfig) -> list[Caption]:
        start = perf_counter()
        state = self.engine.encode(np.stack([image.pixels for image in images]))
        encoded = perf_counter()
        prompts, retrieved = self.prompts(state, config)
        multiple = 1 if self.retriever is None else PADDING  # else all prompts are alike
        found = search(self.engine, state, prompts, config, self.tokens.end, multiple=multiple)
        encode_ms = 1000 * (encoded - start) / len(images)
        search_ms = 1000 * (perf_counter() - encoded) / len(images)
        captions = []
        for image, hypotheses, similar in zip(images, found, retrieved, strict=True):
            candidates = tuple(Candidate(self._text(each.tokens), each.score) for each in hypotheses)
            captions.append(
                Caption(
                    caption=candidates[0].caption,
                    score=candidates[0].score,
                    tokens=hypotheses[0].tokens,
                    candidates=candidates,
                    ms=Timings(decode_image=image.ms, encode=encode_ms, search=search_ms),
                    retrieved=similar,
                )
            )
        return captions

    def prompts(self, state: Any, config: SearchConfig) -> tuple[list[list[int]], list[tuple[str, ...] | None]]:
        """What comes before each image's caption, and the retrieved captions in it."""
        if self.retriever is None:
            return [self.tokens.head] * state.images, [None] * state.images
        # In place of the prompt that the bundle has without retrieval.
        tokens = self.tokens.model_copy(update={"prompt": []})
        room = tokens.room - config.max_new_tokens
        prompts, retrieved = self.retriever.prompts(state.embedding, state.images, room)
        return [[*tokens.head, *prompt] for prompt in prompts], [*retrieved]

    def _text(self, tokens: Sequence[int]) -> str:
        return " ".join(self.tokenizer.decode(list(tokens), skip_special_tokens=True).split())

    def _spellings(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences of each word at the start of a caption and, after a space, within it."""
        if isinstance(words, str) or not all(word.strip() for word in words):
            raise SearchError(f"bad_words must be a list of words, not {words!r}")
        spelled = {space + word.strip() for word in words for space in ("", " ")}
        return tuple(tuple(self.tokenizer.encode(word, add_special_tokens=False).ids) for word in sorted(spelled))

    def _config(self, options: dict[str, Any]) -> SearchConfig:
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        bad_words = self._spellings(given.pop("bad_words", ()))
        if given.get("do_sample"):
            given.setdefault("num_beams", 1)
        try:
            config = SearchConfig(**{**self.search.model_dump(), **given}, bad_words=bad_words)
        except ValidationError as error:
            raise SearchError(reason(error)) from None
        # The last token is not fed back, so it needs no position.
        room = self.tokens.room
        if self.retriever is not None:
            room += len(self.tokens.prompt) - self.retriever.writer.shortest
        if config.max_new_tokens > room:
            limited = self.bundle is not None and self.tokens.max_positions < self.bundle.manifest.tokens.max_positions
            plan = ", which itune-export --max-new-tokens sets" if limited else ""
            raise SearchError(
                f"max_new_tokens must be at most {room}, the decoder's positions after the prompt{plan}, "
                f"not {config.max_new_tokens}"
            )
        return config


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise ItuneError(f"{name} must be at least {least}, not {value}")
    if value > MOST:
        raise ItuneError(f"{name} must be at most {MOST}, not {value}")


def _raise_error(result: Caption | ImageError) -> Caption:
    if isinstance(result, ImageError):
        raise result
    return result
