"""Files beside the photos: the caption as text, or in the description of an XMP sidecar. Photos never change."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ...files import sweep_small, write_small
from ...runtime.errors import ImageError, ItuneError, printable, reading
from .. import common
from ..photos import STDIN
from .base import Captioned, Writer

if TYPE_CHECKING:
    from .xmp import Sidecar

_MEND = "repair it, or move it away"
_MOST_BYTES = 1 << 26
"""Of an existing sidecar; darktable's largest have a few megabytes."""


class Sidecars(Writer):
    """A file beside each photo, which is left alone if it has a caption already, unless `overwrite`."""

    def __init__(self, *, resume: bool, overwrite: bool) -> None:
        self.resume, self.overwrite = resume, overwrite
        self._ours: dict[Path, str] = {}
        """The photos of the sidecars that this run wrote."""
        self._folders: set[Path] = set()

    @abstractmethod
    def path(self, image: str) -> Path:
        """The sidecar of a photo."""

    @abstractmethod
    def is_captioned(self, path: Path) -> bool:
        """Whether a sidecar has a caption."""

    @abstractmethod
    def content(self, path: Path, caption: str) -> bytes:
        """The sidecar's new content."""

    def check(self, images: Iterable[str]) -> None:
        """Raise ItuneError if a sidecar exists that may not be replaced, is a photo itself, or has two photos."""
        owners: dict[Path, str] = {}
        for image in dict.fromkeys(images):
            if image == STDIN:
                raise ItuneError("--sidecar needs the photo's name: - has none")
            path = self.path(image)
            if other := owners.get(path):
                raise ItuneError(f"{path} would be the sidecar of {other} and of {image}: rename one of them")
            owners[path] = image
        common.check_apart(
            ((f"the sidecar of {image}:", path) for path, image in owners.items()),
            (("a photo", Path(image)) for image in owners.values()),
        )
        if not (self.resume or self.overwrite):
            taken = [path for path in owners if self.is_captioned(path)]
            if taken:
                raise ItuneError(
                    f"{taken[0]}{f' and {len(taken) - 1} more sidecars' * (len(taken) > 1)}: there is a caption "
                    "already; --resume skips such photos, --overwrite replaces the captions"
                )

    def has(self, image: str) -> bool:
        """As in Writer. A photo whose sidecar this run wrote comes again because it has changed."""
        path = self.path(image)
        return self.resume and path not in self._ours and self.is_captioned(path)

    def __enter__(self) -> Self:
        return self

    def write(self, captioned: Captioned) -> None:
        """As in Writer."""
        if isinstance(captioned.result, ImageError):
            return
        path = self.path(captioned.image)
        owner = self._ours.get(path, captioned.image)
        if owner != captioned.image:
            raise ItuneError(f"{path} is the sidecar of {owner}: rename {captioned.image}")
        if not (self.overwrite or path in self._ours) and self.is_captioned(path):
            raise ItuneError(f"{path}: there is a caption already; --overwrite replaces it")
        content = self.content(path, captioned.result.caption)
        if path.parent not in self._folders:
            sweep_small(path.parent)
            self._folders.add(path.parent)
        write_small(path.resolve(), content)  # a link stays one
        self._ours[path] = captioned.image


class TextSidecars(Sidecars):
    """photo.txt beside photo.jpg, with the caption as its only line: what fine-tuning tools and itune-train read."""

    def path(self, image: str) -> Path:
        """As in Sidecars."""
        return Path(image).parent / f"{Path(image).stem}.txt"

    def is_captioned(self, path: Path) -> bool:
        """As in Sidecars; a power failure may leave an empty file."""
        return path.exists() and (not path.is_file() or path.stat().st_size > 0)

    def content(self, path: Path, caption: str) -> bytes:  # noqa: ARG002
        """As in Sidecars."""
        return f"{printable(' '.join(caption.split()))}\n".encode()


class XmpSidecars(Sidecars):
    """photo.jpg.xmp beside photo.jpg, with the caption as `dc:description`; its other fields stay."""

    def path(self, image: str) -> Path:
        """As in Sidecars."""
        return Path(f"{image}.xmp")

    def is_captioned(self, path: Path) -> bool:
        """As in Sidecars; not one that cannot be read, which `write` reports."""
        try:
            return bool(_load(path).description)
        except ItuneError:
            return False

    def content(self, path: Path, caption: str) -> bytes:
        """As in Sidecars."""
        sidecar = _load(path)
        sidecar.describe(caption)
        with reading(path, mend=_MEND):  # nested deeper than Python can follow
            return sidecar.to_bytes()


def _load(path: Path) -> Sidecar:
    """The XMP sidecar at a path; an empty one if there is none."""
    from .xmp import Sidecar  # takes 6 ms, as the parser does

    with reading(path, mend=_MEND):
        if not path.exists():
            return Sidecar()
        if not path.is_file():
            raise ValueError("is not a file")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"has more than {_MOST_BYTES} bytes")
        return Sidecar(content)
