"""The heatmap outputs of itune-run: figures, and the numbers behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from ..files import atomic_path
from ..runtime.errors import ItuneError, reading
from . import common
from .program import Options

if TYPE_CHECKING:
    from ..runtime.caption import Caption
    from ..runtime.captioner import Captioner
    from ..runtime.image import Source

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


class HeatmapError(ItuneError):
    """The heatmap of one image cannot be drawn; those of the next ones may."""


class HeatmapOptions(Options, title="Heatmap"):
    """Where the heatmaps go."""

    heatmap: Path | None = None
    """PNG or FOLDER: draw what the adapters attend to for each token; several images need a folder."""
    heatmap_layer: str | None = None
    """last, mean or N: decoder layer of the heatmap, or the mean of all. Default: last."""
    heatmap_json: Path | None = None
    """FILE: write the heatmap's numbers, one JSON object per line and image."""


class Heatmaps:
    """The outputs that the heatmap options ask for: within a `with`, `add` every caption.

    Each figure appears whole, and the JSON file once all images are done.
    """

    def __init__(self, options: HeatmapOptions, images: Sequence[str]) -> None:
        """Raise ItuneError if options contradict each other or a path cannot be written."""
        figures, numbers = options.heatmap, options.heatmap_json
        self.figures, self.numbers, self.layer = figures, numbers, options.heatmap_layer or "last"
        self._stack = ExitStack()
        self._lines: TextIO | None = None
        if numbers == Path("-") or (not self and options.heatmap_layer is not None):
            needed = "--heatmap-layer needs --heatmap or --heatmap-json"
            raise ItuneError("--heatmap-json - must be a file: the captions go to standard output" if self else needed)
        self._paths = [] if figures is None else _figure_paths(figures, images)
        self.files = [("--heatmap", path) for path in self._paths]
        self.files += [] if numbers is None else [("--heatmap-json", numbers)]
        for option, path in self.files:
            common.check_writable(option, path, parents=False)

    def __bool__(self) -> bool:
        """Whether any output is wanted."""
        return self.figures is not None or self.numbers is not None

    def __enter__(self) -> Self:
        if self.numbers is not None:
            from ..files import atomic_path

            temporary = self._stack.enter_context(atomic_path(self.numbers))
            self._lines = self._stack.enter_context(temporary.open("w", encoding="utf-8"))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # A run that was asked to stop keeps the lines that it has written.
        asked = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self._stack.__exit__(*((None, None, None) if asked else (kind, *error)))  # type: ignore[arg-type]

    def add(
        self, captioner: Captioner, number: int, name: str, image: Source, caption: Caption, **options: Any
    ) -> None:
        """Write the heatmap of the caption of image `number` (from 0), called `name`.

        `options` are the search options that wrote the caption: its length decides how many captions fit the prompt.

        Raises:
            HeatmapError: the image can no longer be read, or its figure cannot be written.
        """
        try:
            self._add(captioner, number, name, image, caption, **options)
        except ItuneError as error:
            raise HeatmapError(f"no heatmap: {error}") from error

    def _add(
        self, captioner: Captioner, number: int, name: str, image: Source, caption: Caption, **options: Any
    ) -> None:
        from ..runtime.attention.heatmap import draw_heatmap

        explanation = captioner.explain(image, caption, layer=self.layer, **options)
        if self._lines is not None:
            self._lines.write(json.dumps({"image": name, **explanation.to_dict()}) + "\n")
        if self.figures is not None:
            path = self._paths[number]
            figure = draw_heatmap(explanation)
            with atomic_path(path) as temporary:
                figure.save(temporary, FORMATS[path.suffix.lower()], quality=92)


def _figure_paths(figures: Path, images: Sequence[str]) -> list[Path]:
    """The figure of every image: in a folder it has the image's name, with a number if that is taken."""
    if figures.suffix and not figures.is_dir():
        if figures.suffix.lower() not in FORMATS or len(images) > 1:
            raise ItuneError(
                f"--heatmap {figures}: a figure's name ends in {', '.join(FORMATS)}, and holds one image, not "
                f"{len(images)}: name a folder for several"
            )
        return [figures]
    with reading(f"--heatmap {figures}", mend="name another folder"):
        figures.mkdir(parents=True, exist_ok=True)
    names: dict[str, None] = {}
    for image in images:
        stem = name = "stdin" if image == "-" else Path(image).stem
        number = 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names[name] = None
    return [figures / f"{name}.png" for name in names]
