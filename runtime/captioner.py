"""`Captioner`: images in, captions out. It joins an engine, the search, a tokenizer and the preprocessing.

It works with any engine: those that run a bundle's graphs, and eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from tokenizers import Tokenizer

from .bundle import BUNDLE_FOLDER, DEFAULT, TOKENIZER, Bundle, TokenSettings
from .caption import Candidate, Caption, Timings
from .engines.base import Engine
from .errors import BundleError, ImageError, ItuneError, SearchError, reading
from .image import Source, decode, is_one, jpeg_url, preprocess
from .pipeline import decode_ahead
from .retrieval.prompts import Retriever
from .search import SearchConfig
from .search.loop import PADDING, search
from .search.options import OptionReader
from .settings import ImageSettings, SearchDefaults, Settings
from .text import decode_text, encode_caption, load_tokenizer

if TYPE_CHECKING:
    from .attention.explanation import Explainer, Explanation, Layer

ENGINES = ("auto", "tensorrt", "onnxruntime-cuda", "native", "onnxruntime")
"""The fastest that can run the bundle here; TensorRT plans; ONNX Runtime on a GPU; on the CPU the decoder in C++, or
ONNX Runtime for everything."""
MAX_WORKERS = 4
"""Default maximum of decoding threads; each may hold a large photo in memory."""
MOST = 4096
"""Maximum of threads, workers, and images in a batch."""
T = TypeVar("T", bound=Source)
_Decoded = tuple[NDArray[np.uint8], float]  # pixels, and the milliseconds that they took


class _StreamOptions(Settings):
    batch_size: Annotated[int, Field(ge=1, le=MOST)] = 1
    workers: Annotated[int, Field(ge=0, le=MOST)] = 0


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
    ) -> None:
        """Join the parts; `load` also sets what follows."""
        self.engine, self.tokenizer, self.image, self.tokens, self.search = engine, tokenizer, image, tokens, search
        self.retriever: Retriever | None = None
        """Writes prompts with retrieved captions; None: the prompt is that of `tokens`."""
        self.bundle: Bundle | None = None
        """The bundle that the engine runs; None for a checkpoint in PyTorch."""
        self.engine_name = ""
        """One of ENGINES; empty for a checkpoint in PyTorch."""
        self.engine_notice: str | None = None
        """How "auto" chose the engine, as a sentence for the user; None: as usual."""
        self.threads: int | None = None
        """Threads of the engine; None: its own choice."""
        self.workers = 1
        """Threads that decode images, unless `stream` sets others."""
        self._reload: Callable[[], Captioner] | None = None

    def __reduce__(self) -> tuple[Callable[[], Captioner], tuple[()]]:
        """Pickle as a call of `load` with the same arguments: the other process loads the bundle again."""
        if self._reload is None:
            raise ItuneError("a checkpoint in PyTorch cannot be pickled: load it in the other process")
        return self._reload, ()

    @property
    def option_reader(self) -> OptionReader:
        """Checks the search options of `caption`, `stream` and `explain`."""
        room = self.tokens.room
        if self.retriever is not None:
            room += len(self.tokens.prompt) - self.retriever.writer.shortest
        return OptionReader(self.search, self.tokenizer, room)

    @property
    def kernels(self) -> str | None:
        """The instruction set that the native engine uses, such as "avx512-vnni"; None for other engines."""
        return getattr(self.engine, "kernels", None)

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

        `engine` is one of ENGINES; `threads` None lets the engine choose. A bundle made for retrieval takes `retrieve`
        captions (None: as many as in training; 0: none) of `datastore` into each prompt; the default datastore is the
        folder `datastore` in the bundle.

        Raises:
            BundleError: the bundle is missing, damaged, of another schema version, or not made for retrieval.
            DatastoreError: the datastore is missing, damaged, or was built with another encoder.
            EngineError: the engine cannot run here; with "auto", a bundle of TensorRT plans where there is no GPU.
        """
        if engine not in ENGINES or not 1 <= (1 if threads is None else threads) <= MOST or (retrieve or 0) < 0:
            raise ItuneError(
                f"engine {engine!r}, threads {threads}, retrieve {retrieve}: engine must be one of "
                f"{', '.join(ENGINES)}, threads 1 to {MOST}, retrieve at least 0"
            )
        bundle = Bundle.load(DEFAULT if folder is None else Path(folder))
        options: dict[str, Any] = {"engine": engine, "threads": threads, "retrieve": retrieve}
        options["datastore"] = None if datastore is None else Path(datastore).resolve()
        with reading(bundle.path(TOKENIZER), BundleError, BUNDLE_FOLDER.mend):
            tokenizer = load_tokenizer(bundle.path(TOKENIZER))
        manifest = bundle.manifest
        retriever = Retriever.load(
            manifest.retrieval, manifest.text, tokenizer, model=bundle.folder, datastore=datastore, k=retrieve
        )
        # Slow to import: only once the bundle is good.
        from .cpus import available_cpus
        from .engines.choice import load_engine

        chosen = load_engine(bundle, engine, threads)
        captioner = cls(chosen.engine, tokenizer, manifest.image, chosen.tokens, manifest.search)
        captioner.retriever, captioner.bundle, captioner.threads = retriever, bundle, threads
        captioner._reload = partial(cls.load, bundle.folder.resolve(), **options)
        captioner.engine_name, captioner.engine_notice = chosen.name, chosen.notice
        # The thread that runs the model also decodes while it would wait.
        captioner.workers = min(MAX_WORKERS, (threads or available_cpus()) - 1)
        return captioner

    @overload
    def caption(self, images: T, *, batch_size: int = 8, workers: int | None = None, **options: Any) -> Caption: ...

    @overload
    def caption(
        self, images: Iterable[T], *, batch_size: int = 8, workers: int | None = None, **options: Any
    ) -> list[Caption]: ...

    def caption(
        self, images: Any, *, batch_size: int = 8, workers: int | None = None, **options: Any
    ) -> Caption | list[Caption]:
        """Caption one image, or each image of a list or another iterable.

        An image is a path, an open file or the bytes of an encoded file, a Pillow image or an array (see
        `image.decode`). `options`
        are the fields of `SearchConfig`, with `bad_words` as a list of words; None stands for the default. Several
        threads may share a Captioner. `batch_size` and `workers` are those of `stream`.

        Raises:
            ImageError: an image cannot be decoded; `stream` goes on with the others.
            SearchError: an unknown option, or options that contradict each other or the model.
        """
        if is_one(images):
            return self.caption([images], batch_size=batch_size, workers=workers or 0, **options)[0]
        captions = []
        for _, result in self._stream(images, batch_size, workers, options, thumbnails=True):
            if isinstance(result, ImageError):
                raise result
            captions.append(result)
        return captions

    def stream(
        self, images: Iterable[T], *, batch_size: int = 8, workers: int | None = None, **options: Any
    ) -> Iterator[tuple[T, Caption | ImageError]]:
        """Caption images as they come, in order; a bad image yields its error, and the others go on.

        While `batch_size` images go through the model together, `workers` threads decode the next files (None: one
        fewer than the engine's threads, at most MAX_WORKERS). At most 2 * batch_size images, without workers
        batch_size, are held in memory at once. An exception of the iterable `images` is raised after the captions of
        the images before it.
        """
        if is_one(images):
            raise SearchError("stream takes several images: give a list, or call caption for one")
        return self._stream(images, batch_size, workers, options)

    @cached_property
    def explainer(self) -> Explainer:
        """Reads the attention for `explain`; loaded on first use.

        Raises:
            BundleError: the captioner runs no bundle, or one whose attention cannot be shown.
        """
        from .attention.explanation import Explainer

        engine: Any = self.engine if hasattr(self.engine, "attention") else None
        return Explainer.load(self.bundle, self.tokenizer, self.threads, engine)

    def explain(
        self, image: Source, caption: Caption | str | None = None, *, layer: Layer = "last", **options: Any
    ) -> Explanation:
        """Where the adapters look in an image while the model writes its caption: a heatmap for every token.

        `caption` is a result, or your own text, which the model is made to write; None: the best caption that the
        search finds with `options`. Its tokens go through the decoder once, on the CPU, whichever engine captions;
        where that is not the native one, the first call loads the bundle's ONNX graphs for it. `layer` is an adapted
        decoder layer, "last", or "mean".
        `draw_heatmap` draws the result.

        Raises:
            ImageError: the image cannot be decoded.
            BundleError: the bundle has no attention to show (TensorRT plans only, a method without adapters), or does
                not say where its visual tokens lie in the image.
            ItuneError: there is no adapter on `layer`, or the model cannot write `caption`.
        """
        explainer = self.explainer
        explainer.choose(layer)  # before the search
        photo, config = decode(image), self.option_reader.read(options)
        if caption is None:
            caption = self.caption(photo, **options)
        if isinstance(caption, str):
            with reading("caption"):
                caption.encode()  # names a lone surrogate; the tokenizer would not
                tokens = tuple(encode_caption(self.tokenizer, explainer.manifest.text, caption))
        else:
            tokens = caption.tokens
        return explainer.explain(photo, tokens, layer, lambda state: self.prompts(state, config)[0][0])

    def _stream(
        self,
        images: Iterable[T],
        batch_size: int,
        workers: int | None,
        options: dict[str, Any],
        *,
        thumbnails: bool = False,
    ) -> Iterator[tuple[T, Caption | ImageError]]:
        """As `stream`; with `thumbnails`, captions of images without a path keep a small picture."""
        with reading("search options", SearchError):
            own = _StreamOptions(batch_size=batch_size, workers=self.workers if workers is None else workers)
        return self._results(images, own, self.option_reader.read(options, _StreamOptions.model_fields), thumbnails)

    def _results(
        self, images: Iterable[T], options: _StreamOptions, config: SearchConfig, thumbnails: bool
    ) -> Iterator[tuple[T, Caption | ImageError]]:
        decoded = decode_ahead(images, self._decode, batch_size=options.batch_size, workers=options.workers)
        with closing(decoded) as batches:
            for batch in batches:
                good = [image for _, image in batch if not isinstance(image, ImageError)]
                captions = iter(self._caption_batch(good, config) if good else ())
                for source, image in batch:
                    if isinstance(image, ImageError):
                        yield source, image
                    else:
                        picture = _picture(source, image[0] if thumbnails else None)
                        yield source, replace(next(captions), picture=picture)
                del batch  # release its images before the next batch

    def _decode(self, source: Source) -> _Decoded | ImageError:
        start = perf_counter()
        try:
            pixels = preprocess(decode(source), self.image)
        except ImageError as error:
            return ImageError(str(error))  # without the traceback, which would keep the decoded image
        return pixels, 1000 * (perf_counter() - start)

    def _caption_batch(self, images: list[_Decoded], config: SearchConfig) -> list[Caption]:
        start = perf_counter()
        state = self.engine.encode(np.stack([pixels for pixels, _ in images]))
        encoded = perf_counter()
        prompts, retrieved = self.prompts(state, config)
        multiple = 1 if self.retriever is None else PADDING  # without a retriever all prompts are alike
        found = search(self.engine, state, prompts, config, self.tokens.end, multiple=multiple)
        encode_ms, search_ms = (1000 * seconds / len(images) for seconds in (encoded - start, perf_counter() - encoded))
        captions = []
        for (_, decode_ms), hypotheses, similar in zip(images, found, retrieved, strict=True):
            candidates = tuple(Candidate(decode_text(self.tokenizer, h.tokens), h.score) for h in hypotheses)
            best, ms = candidates[0], Timings(decode_ms, encode_ms, search_ms)
            captions.append(Caption(best.caption, best.score, hypotheses[0].tokens, candidates, ms, similar))
        return captions

    def prompts(self, state: Any, config: SearchConfig) -> tuple[list[list[int]], list[tuple[str, ...] | None]]:
        """The prompt tokens of each image in `state`, and the retrieved captions in them."""
        if self.retriever is None:
            return [self.tokens.prompt_tokens] * state.images, [None] * state.images
        # The retrieval prompt replaces the bundle's own.
        tokens = self.tokens.model_copy(update={"prompt": []})
        prompts, retrieved = self.retriever.prompts(state, tokens.room - config.max_new_tokens)
        return [[*tokens.prompt_tokens, *prompt] for prompt in prompts], [*retrieved]


def _picture(source: Source, pixels: NDArray[np.uint8] | None) -> str | None:
    """How a caption shows its photo: by its path, or else by the pixels that the tower saw, if they are given."""
    if isinstance(source, str | Path):
        return str(source)
    return None if pixels is None else jpeg_url(Image.fromarray(pixels))
