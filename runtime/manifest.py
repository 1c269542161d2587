"""Folders described by a JSON manifest: read the manifest, and check the files that it lists.

A bundle or a datastore may come from anywhere. The manifest is parsed strictly; each file that a program
reads must have the size and SHA-256 that the manifest records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Generic, TypeVar

from pydantic import AfterValidator, Field

from .errors import ItuneError, reading
from .recovery import recover_folder
from .settings import Settings, Sha256


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    leaves = path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts or "\\" in name
    if leaves or not path.parts or not name.isprintable():
        raise ValueError(f"{name!r} is not a file name inside the folder")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
"""A path relative to the manifest's folder, with forward slashes, that does not leave it."""
Count = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]


class FileHash(Settings):
    """Size and SHA-256 of a file."""

    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]

    def __str__(self) -> str:
        return f"{self.bytes} bytes with SHA-256 {self.sha256[:12]}"

    @classmethod
    def of(cls, path: Path) -> FileHash:
        """Hash a file without reading it into memory at once."""
        with path.open("rb") as file:
            return cls(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)


Model = TypeVar("Model", bound=Settings)


@dataclass(frozen=True)
class ManifestFolder(Generic[Model]):
    """A kind of folder. All its problems become an `error` that names the file and ends with `mend`."""

    manifest: str
    """File name of the manifest."""
    model: type[Model]
    error: type[ItuneError]
    mend: str
    """What the user can do, such as "export the bundle again"."""

    def read(self, folder: Path) -> Model:
        """Parse the manifest, without looking at the files that it lists."""
        with reading(folder / self.manifest, self.error, self.mend):
            recover_folder(folder)
            return self.model.model_validate_json((folder / self.manifest).read_bytes(), strict=True)

    def check(
        self, folder: Path, files: Mapping[str, FileHash], needed: Collection[str], hash_up_to: float = inf
    ) -> None:
        """Compare the `needed` files with the `files` that the manifest lists.

        Sizes are always compared; hashes are compared of files up to `hash_up_to` bytes, and of all those outside the
        folder, to which the links in a hub's cache lead.
        """
        for name in sorted(set(needed)):
            with reading(folder / name, self.error, self.mend):
                path, listed = (folder / name).resolve(), files.get(name)
                size, outside = path.stat().st_size, not path.is_relative_to(folder.resolve())
                hashed = outside or size <= hash_up_to
                if listed is None or size != listed.bytes or (hashed and FileHash.of(path) != listed):
                    problem = "not listed" if listed is None else "damaged"
                    raise ValueError(f"{problem} ({size} bytes; {self.manifest} lists {listed})")
