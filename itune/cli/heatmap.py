"""Where itune-run puts its heatmaps: figures, and the numbers behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from ..files import atomic_path, holds
from ..runtime.errors import ItuneError
from . import common

if TYPE_CHECKING:
    from ..runtime.captioner import Caption, Captioner
    from ..runtime.image import Source

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


class FigureError(ItuneError):
    """A figure cannot be written."""


class Heatmaps:
    """What --heatmap, --heatmap-json and --heatmap-layer ask for: within a `with`, `add` every caption.

    Each figure appears whole, and the JSON file once all images are done.
    """

    def __init__(self, figures: Path | None, numbers: Path | None, layer: str | None, images: Sequence[str]) -> None:
        """`figures`: a file, or a folder with a figure for each of the `images`; `numbers`: a file of JSON lines.

        Raises:
            ItuneError: the options contradict each other, or a path cannot be written.
        """
        self.figures, self.numbers, self.layer = figures, numbers, "last" if layer is None else layer
        self._paths: list[Path] = []
        self._stack = ExitStack()
        self._lines: TextIO | None = None
        if figures is None and numbers is None and layer is not None:
            raise ItuneError("--heatmap-layer is for --heatmap or --heatmap-json: give one of them, too")
        if figures is not None:
            self._paths = _figure_paths(figures, images)
        outputs = [("--heatmap", path) for path in self._paths]
        if numbers == Path("-"):
            raise ItuneError("--heatmap-json -: standard output is for the captions; name a file")
        if numbers is not None:
            _check_writable("--heatmap-json", numbers)
            outputs.append(("--heatmap-json", numbers))
        common.check_apart(outputs, (("the photo", Path(image)) for image in images if image != "-"))

    def __bool__(self) -> bool:
        """Whether any are wanted."""
        return self.figures is not None or self.numbers is not None

    def __enter__(self) -> Self:
        if self.numbers is not None:
            temporary = self._stack.enter_context(atomic_path(self.numbers))
            self._lines = self._stack.enter_context(temporary.open("w", encoding="utf-8"))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def add(
        self, captioner: Captioner, number: int, name: str, image: Source, caption: Caption, **options: Any
    ) -> None:
        """Write what a caption looked at in the image with this number, from 0, and name.

        `options` are those of the search that wrote it: how long it may be decides what its prompt had room for.

        Raises:
            ImageError: the image cannot be read any more.
            FigureError: its figure cannot be written.
        """
        from ..runtime.attention.heatmap import draw_heatmap

        explanation = captioner.explain(image, caption, layer=self.layer, **options)
        if self._lines is not None:
            self._lines.write(json.dumps({"image": name, **explanation.to_dict()}) + "\n")
        if self.figures is not None:
            path = self._paths[number]
            figure = draw_heatmap(explanation)
            try:
                with atomic_path(path) as temporary:
                    figure.save(temporary, FORMATS[path.suffix.lower()], quality=92)
            except OSError as error:
                raise FigureError(f"{path} cannot be written ({error.strerror})") from None


def _figure_paths(figures: Path, images: Sequence[str]) -> list[Path]:
    """Where the figure of every image goes: in a folder it has the image's name, numbered if another one has it."""
    if figures.suffix and not figures.is_dir():
        if figures.suffix.lower() not in FORMATS:
            raise ItuneError(f"--heatmap {figures}: the name of a figure ends in {', '.join(FORMATS)}")
        if len(images) > 1:
            raise ItuneError(f"--heatmap {figures} is one figure, but there are {len(images)} images: name a folder")
        _check_writable("--heatmap", figures)
        return [figures]
    _make_folder("--heatmap", figures)
    names: dict[str, None] = {}
    for image in images:
        stem = free = "stdin" if image == "-" else Path(image).stem
        number = 1
        while free in names:
            number += 1
            free = f"{stem}-{number}"
        names[free] = None
    paths = [figures / f"{name}.png" for name in names]
    if folder := next((path for path in paths if holds(path.is_dir)), None):
        raise ItuneError(f"--heatmap {figures}: {folder} is a folder, where a figure would be: name another folder")
    return paths


def _check_writable(option: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise ItuneError(f"{option} {path}: there is no folder {path.parent}: make it, or name another")
    common.check_writable(option, path)


def _make_folder(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ItuneError(f"{option} {folder} cannot be made a folder ({error.strerror}): name another") from None
    if not os.access(folder, os.W_OK):
        raise ItuneError(f"{option} {folder} cannot be written to: name another folder")
