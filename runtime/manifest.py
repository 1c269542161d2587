"""Folders that are described by a manifest in JSON: reading it, and checking the files that it lists.

Such a folder (a bundle, a datastore) comes from anywhere, so nothing in it is believed: the manifest is parsed
strictly, every file that it names must lie inside the folder and have the size and the SHA-256 that the manifest gives,
and whatever is wrong becomes one sentence.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Generic, TypeVar

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import from_json

from .errors import ItuneError
from .settings import Settings


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    elsewhere = path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts or "\\" in name
    if elsewhere or not path.parts or not name.isprintable():
        raise ValueError(f"{name!r} names no file inside the folder")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
"""A path relative to the manifest's folder, with forward slashes, that does not leave it."""
Count = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class FileHash(Settings):
    """What a file of the folder must be."""

    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]

    @classmethod
    def of(cls, path: Path) -> FileHash:
        """Hash a file without reading it into memory at once."""
        with path.open("rb") as file:
            return cls(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)


Model = TypeVar("Model", bound=Settings)


@dataclass(frozen=True)
class ManifestFolder(Generic[Model]):
    """A kind of folder: the name and the model of its manifest, and the words of what is said about a broken one."""

    noun: str
    """Such as "bundle"."""
    manifest: str
    """The manifest's file name."""
    model: type[Model]
    version_field: str
    version: int
    error: type[ItuneError]
    maker: str
    """The command that writes such a folder."""
    rebuild: str
    """What mends a manifest, such as "export the bundle again"."""

    @property
    def mend(self) -> str:
        """What mends a damaged file."""
        return f"copy the {self.noun} again, or {self.rebuild}"

    def read(self, folder: Path) -> Model:
        """Parse the manifest; the files that it lists are not looked at.

        Raises:
            ItuneError: of the class `error`: no such folder or manifest, another version, or a broken field.
        """
        path = folder / self.manifest
        if not folder.is_dir():
            raise self.error(f"{folder} is not a folder; a {self.noun} is the folder that {self.maker} writes")
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise self.error(f"{folder} is not a {self.noun}: it has no {self.manifest}") from None
        except OSError as error:
            raise self.error(f"{path} cannot be read: {error.strerror}") from error
        try:
            content = from_json(text, allow_inf_nan=False)
        except ValueError as error:
            raise self.error(f"{path} is not JSON ({error}); {self.mend}") from error
        version = content.get(self.version_field) if isinstance(content, dict) else None
        if version != self.version:
            raise self.error(
                f"{path}: {self.version_field} is {version!r}, but this itune reads version {self.version}; "
                f"{self.rebuild} with this itune"
            )
        try:
            return self.model.model_validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            field = ".".join(str(part) for part in first["loc"]).encode("unicode_escape").decode()
            raise self.error(f"{path}: {field or 'content'}: {first['msg']}; {self.rebuild}") from error

    def check(self, folder: Path, name: str, expected: FileHash, *, verify: bool) -> None:
        """Compare a file's size with the manifest's, and with `verify` its hash.

        Raises:
            ItuneError: of the class `error`: the file is missing, damaged, unreadable or outside the folder.
        """
        path = folder / name
        try:
            if not path.resolve().is_relative_to(folder.resolve()):
                raise self.error(f"{path} leads out of the {self.noun}'s folder; put a copy of the file there")
            if not path.is_file():
                raise self.error(f"{path} is missing; {self.mend}")
            size = path.stat().st_size
            if size != expected.bytes:
                raise self.error(f"{path} is damaged ({size} bytes instead of {expected.bytes}); {self.mend}")
            if verify and FileHash.of(path) != expected:
                raise self.error(f"{path} is damaged (wrong SHA-256); {self.mend}")
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
            raise self.error(f"{path} cannot be read: {error}") from error
