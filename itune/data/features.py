"""Visual embeddings of training photos: computed as they are needed, or once and memory-mapped.

The tower is frozen, so an image's embeddings never change: with `--cache-features` they are kept in half
precision, in a folder of their own for every tower and preprocessing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from ..backbones import VisionTower
from ..files import atomic_path, hash_files
from ..runtime.engines.base import UInt8
from ..runtime.errors import ImageError, ItuneError
from ..runtime.image import decode, preprocess

Progress = Callable[[int, int], None]
"""Told (images done, images in all)."""
_BATCH = 16  # photos that go through the tower at once


class Features(Protocol):
    """Where training and evaluation get visual embeddings from."""

    tokens: int
    width: int

    def prepare(
        self, images: Sequence[Path], *, flip: bool = False, progress: Progress | None = None
    ) -> dict[Path, str]:
        """Make these photos ready to be read; returns those that cannot be decoded, with the reason."""
        ...

    def read(self, images: Sequence[Path], flip: Sequence[bool] | None = None) -> Tensor:
        """Embeddings [images, tokens, width] of photos, mirrored where `flip` says so."""
        ...


class LiveFeatures:
    """Runs the tower each time."""

    def __init__(self, tower: VisionTower, threads: int = 2) -> None:
        self.tower, self.tokens, self.width = tower, tower.tokens, tower.width
        self._pool = ThreadPoolExecutor(threads)

    def prepare(
        self, images: Sequence[Path], *, flip: bool = False, progress: Progress | None = None
    ) -> dict[Path, str]:
        """Decode every photo once, so that a bad one is known before training (see `Features.prepare`)."""
        del flip  # mirroring needs no preparation here
        unreadable: dict[Path, str] = {}
        for done, (path, pixels) in enumerate(zip(images, self._pool.map(self.pixels, images), strict=True), 1):
            if isinstance(pixels, str):
                unreadable[path] = pixels
            if progress:
                progress(done, len(images))
        return unreadable

    def pixels(self, path: Path) -> UInt8 | str:
        """A photo's pixels, or why there are none."""
        try:
            return preprocess(decode(path), self.tower.image)
        except ImageError as error:
            return str(error)

    def embed(self, paths: Sequence[Path], mirrored: Sequence[bool]) -> tuple[Tensor, dict[Path, str]]:
        """Embeddings of the photos that can be decoded, and the reasons of the others."""
        decoded = list(self._pool.map(self.pixels, paths))
        unreadable = {path: p for path, p in zip(paths, decoded, strict=True) if isinstance(p, str)}
        pixels = [
            p[:, ::-1] if flip else p for p, flip in zip(decoded, mirrored, strict=True) if not isinstance(p, str)
        ]
        if not pixels:
            return torch.empty(0, self.tokens, self.width), unreadable
        return self.tower.embed(np.stack(pixels)), unreadable

    def read(self, images: Sequence[Path], flip: Sequence[bool] | None = None) -> Tensor:
        """See `Features.read`."""
        embeddings, unreadable = self.embed(images, flip if flip is not None else [False] * len(images))
        for reason in unreadable.values():
            raise ImageError(reason)
        return embeddings


class FeatureCache:
    """Embeddings in one fp16 file per tower, preprocessing and mirroring; grows, and survives interruption.

    `features.f16` holds rows [tokens, width]; line i of `index.jsonl` names the photo of row i by path, size and
    time of change. A row counts once its line is complete, so a build that was cut off goes on where it was. Of several
    processes with one cache, one adds to it while the others wait.
    """

    def __init__(self, folder: Path, tower: VisionTower) -> None:
        self.tower, self.tokens, self.width = tower, tower.tokens, tower.width
        self._folders = [folder / cache_key(tower, flip) for flip in (False, True)]
        self._rows: list[dict[Path, int]] = [{}, {}]
        """Where a photo's embeddings are, as it was when it was prepared."""
        self._maps: list[NDArray[np.float16] | None] = [None, None]

    def prepare(
        self, images: Sequence[Path], *, flip: bool = False, progress: Progress | None = None
    ) -> dict[Path, str]:
        """Compute what is missing (see `Features.prepare`)."""
        unreadable: dict[Path, str] = {}
        for mirrored in (False, True) if flip else (False,):
            unreadable |= self._build(images, mirrored, progress)
        return unreadable

    def read(self, images: Sequence[Path], flip: Sequence[bool] | None = None) -> Tensor:
        """See `Features.read`."""
        flips = flip if flip is not None else [False] * len(images)
        rows = np.empty((len(images), self.tokens, self.width), np.float16)
        for i, (path, mirrored) in enumerate(zip(images, flips, strict=True)):
            stored = self._maps[mirrored]
            if stored is None:
                raise RuntimeError("call `prepare` with these photos first")
            rows[i] = stored[self._rows[mirrored][path]]
        return torch.from_numpy(rows).float()

    def _build(self, images: Sequence[Path], mirrored: bool, progress: Progress | None) -> dict[Path, str]:
        folder = self._folders[mirrored]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ItuneError(
                f"--cache-features {folder.parent} cannot be made a folder ({error.strerror}): name another"
            ) from None
        data, index = folder / "features.f16", folder / "index.jsonl"
        with FileLock(folder / "lock"):
            with atomic_path(folder / "tower.json") as temporary:
                temporary.write_text(json.dumps(cache_identity(self.tower, mirrored), indent=2) + "\n")
            rows = self._recover(data, index)
            names, unreadable = _identities(images)
            bad = self._add(names, mirrored, rows, progress)
        for path, name in names.items():
            if name in bad:
                unreadable[path] = bad[name]
            else:
                self._rows[mirrored][path] = rows[name]
        shape = (len(rows), self.tokens, self.width)  # an empty file cannot be mapped
        self._maps[mirrored] = (
            np.memmap(data, np.float16, mode="r", shape=shape) if rows else np.empty(shape, np.float16)
        )
        return unreadable

    def _add(
        self, names: dict[Path, str], mirrored: bool, rows: dict[str, int], progress: Progress | None
    ) -> dict[str, str]:
        """Append the photos that are not among `rows`, and enter them there; returns why some cannot be read."""
        folder = self._folders[mirrored]
        # Two paths may lead to one photo.
        missing = list({name: path for path, name in names.items() if name not in rows}.items())
        unreadable: dict[str, str] = {}
        live = LiveFeatures(self.tower)
        done = len(names) - len(missing)
        data, index = folder / "features.f16", folder / "index.jsonl"
        with data.open("ab") as features, index.open("a", encoding="utf-8") as lines:
            for start in range(0, len(missing), _BATCH):
                batch = missing[start : start + _BATCH]
                embeddings, bad = live.embed([path for _, path in batch], [mirrored] * len(batch))
                unreadable |= {name: bad[path] for name, path in batch if path in bad}
                features.write(embeddings.to(torch.float16).cpu().numpy().tobytes())
                features.flush()
                for name in (name for name, path in batch if path not in bad):
                    rows[name] = len(rows)
                    lines.write(json.dumps(name) + "\n")
                lines.flush()
                done += len(batch)
                if progress:
                    progress(done, len(names))
        return unreadable

    def _recover(self, data: Path, index: Path) -> dict[str, int]:
        """The complete rows; what an interruption left half-written is cut off."""
        lines = index.read_bytes().splitlines(keepends=True) if index.exists() else []
        names = [name for name in takewhile(bool, map(_name, lines)) if name]
        row_bytes = self.tokens * self.width * 2
        complete = min(len(names), data.stat().st_size // row_bytes if data.exists() else 0)
        if data.exists():
            with data.open("r+b") as file:
                file.truncate(complete * row_bytes)
            with index.open("a+b") as file:
                file.truncate(sum(map(len, lines[:complete])))
        return {name: row for row, name in enumerate(names[:complete])}


def _name(line: bytes) -> str | None:
    """The photo that a line of the index names; None where the line is cut off or damaged."""
    try:
        name = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return name if isinstance(name, str) else None


def _identities(images: Sequence[Path]) -> tuple[dict[Path, str], dict[Path, str]]:
    """The photos' keys, and the reasons of those that have none."""
    names: dict[Path, str] = {}
    unreadable: dict[Path, str] = {}
    for path in images:
        try:
            names[path] = identity(path)
        except ImageError as error:
            unreadable[path] = str(error)
    return names, unreadable


def identity(path: Path) -> str:
    """A photo's key in the cache: a changed file is another photo."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from None
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"


def cache_identity(tower: VisionTower, flip: bool) -> dict[str, Any]:
    """Everything that embeddings depend on, beside the photo."""
    return {
        "tower": tower.sha256,
        "config": _config_hash(tower.folder),
        "tokens": tower.tokens,
        "width": tower.width,
        "image": tower.image.model_dump(mode="json"),
        "flip": flip,
    }


def _config_hash(folder: Path) -> str | None:
    """Of what says how a tower's weights are computed with; an ONNX graph says so itself."""
    path = folder / "config.json"
    return hash_files([path]) if path.is_file() else None


def cache_key(tower: VisionTower, flip: bool) -> str:
    """The cache's subfolder for a tower, its preprocessing, and mirroring."""
    text = json.dumps(cache_identity(tower, flip), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
