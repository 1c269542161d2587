"""Visual embeddings of training photos: computed on demand, or computed once and memory-mapped.

The tower is frozen, so a photo's embeddings never change: `--cache-features` keeps them in half precision, in a
subfolder per tower and preprocessing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from ..backbones import VisionTower
from ..files import hash_files, write_json
from ..progress import OnProgress
from ..runtime.engines.base import UInt8
from ..runtime.errors import ImageError, reading
from ..runtime.image import decode, preprocess

_BATCH = 16  # photos per forward pass of the tower


class Features(Protocol):
    """A source of visual embeddings for training and evaluation."""

    tokens: int
    width: int

    def prepare(
        self, images: Sequence[Path], *, flip: bool = False, progress: OnProgress | None = None
    ) -> dict[Path, str]:
        """Prepare photos for `read`, and with `flip` their mirror images; return the unreadable ones and why."""
        ...

    def read(self, images: Sequence[Path], flip: Sequence[bool] | None = None) -> Tensor:
        """Return the embeddings [images, tokens, width] of prepared photos, mirrored where `flip` is True."""
        ...


class LiveFeatures:
    """Runs the tower at every read."""

    def __init__(self, tower: VisionTower, threads: int = 2) -> None:
        self.tower, self.tokens, self.width = tower, tower.tokens, tower.width
        self._pool = ThreadPoolExecutor(threads)

    def prepare(
        self, images: Sequence[Path], *, flip: bool = False, progress: OnProgress | None = None
    ) -> dict[Path, str]:
        """Decode every photo once, so that training starts without unreadable ones."""
        del flip  # mirroring needs no preparation here
        unreadable: dict[Path, str] = {}
        for done, (path, pixels) in enumerate(zip(images, self._pool.map(self.pixels, images), strict=True), 1):
            if isinstance(pixels, str):
                unreadable[path] = pixels
            if progress:
                progress(done, len(images))
        return unreadable

    def pixels(self, path: Path) -> UInt8 | str:
        """Return a photo's preprocessed pixels [H, W, 3], or the reason why it cannot be decoded."""
        try:
            return preprocess(decode(path), self.tower.image)
        except ImageError as error:
            return str(error)

    def embed(self, paths: Sequence[Path], mirrored: Sequence[bool]) -> tuple[Tensor, dict[Path, str]]:
        """Return the embeddings of the readable photos, and the unreadable ones with the reasons."""
        decoded = list(self._pool.map(self.pixels, paths))
        unreadable = {path: p for path, p in zip(paths, decoded, strict=True) if isinstance(p, str)}
        pixels = [
            p[:, ::-1] if flip else p for p, flip in zip(decoded, mirrored, strict=True) if not isinstance(p, str)
        ]
        if not pixels:
            return torch.empty(0, self.tokens, self.width), unreadable
        return self.tower.embed(np.stack(pixels)), unreadable

    def read(self, images: Sequence[Path], flip: Sequence[bool] | None = None) -> Tensor:
        """Embed the photos now. Raises ImageError if one cannot be decoded."""
        embeddings, unreadable = self.embed(images, flip if flip is not None else [False] * len(images))
        if unreadable:
            raise ImageError(next(iter(unreadable.values())))
        return embeddings


class FeatureCache:
    """Embeddings in one fp16 file per tower, preprocessing and mirroring; several processes may share it.

    `features.f16` contains rows [tokens, width]; line i of `index.jsonl` names the photo of row i. A row counts once
    its line is complete, so an interrupted build continues where it stopped. One process at a time appends. Plain
    files, because HDF5 files break when a writer is killed, and zarr and safetensors need a file per chunk.
    """

    def __init__(self, folder: Path, tower: VisionTower) -> None:
        self.tower, self.tokens, self.width = tower, tower.tokens, tower.width
        self._identities = [cache_identity(tower, flip) for flip in (False, True)]
        keys = (hashlib.sha256(json.dumps(each, sort_keys=True).encode()) for each in self._identities)
        self._folders = [folder / key.hexdigest()[:16] for key in keys]
        self._rows: list[dict[Path, int]] = [{}, {}]  # by path, so that a photo that changes later keeps its row
        self._maps: list[NDArray[np.float16]] = [np.empty((0, self.tokens, self.width), np.float16)] * 2

    def prepare(
        self, images: Sequence[Path], *, flip: bool = False, progress: OnProgress | None = None
    ) -> dict[Path, str]:
        """Compute the embeddings that are missing."""
        unreadable: dict[Path, str] = {}
        for mirrored in (False, True) if flip else (False,):
            unreadable |= self._build(images, mirrored, progress)
        return unreadable

    def read(self, images: Sequence[Path], flip: Sequence[bool] | None = None) -> Tensor:
        """Return the embeddings of photos as they were when `prepare` saw them."""
        flips = flip if flip is not None else [False] * len(images)
        rows = [self._maps[side][self._rows[side][path]] for path, side in zip(images, flips, strict=True)]
        return torch.from_numpy(np.stack(rows)).float()

    def _build(self, images: Sequence[Path], mirrored: bool, progress: OnProgress | None) -> dict[Path, str]:
        folder = self._folders[mirrored]
        with reading(f"--cache-features {folder.parent}", mend="choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
        names: dict[Path, str] = {}
        unreadable: dict[Path, str] = {}
        for path in images:
            try:
                names[path] = identity(path)
            except ImageError as error:
                unreadable[path] = str(error)
        with FileLock(folder / "lock"):
            write_json(folder / "tower.json", self._identities[mirrored])
            rows = self._recover(folder)
            bad = self._append(folder, names, mirrored, rows, progress)
        unreadable |= {path: bad[name] for path, name in names.items() if name in bad}
        self._rows[mirrored] |= {path: rows[name] for path, name in names.items() if name in rows}
        if rows:  # an empty file cannot be mapped
            shape = (len(rows), self.tokens, self.width)
            self._maps[mirrored] = np.memmap(folder / "features.f16", np.float16, mode="r", shape=shape)
        return unreadable

    def _append(
        self, folder: Path, names: dict[Path, str], mirrored: bool, rows: dict[str, int], progress: OnProgress | None
    ) -> dict[str, str]:
        """Embed the photos that are not in `rows` and add them to it; return the unreadable ones and why."""
        unreadable: dict[str, str] = {}
        live = LiveFeatures(self.tower)
        missing = list({name: path for path, name in names.items() if name not in rows}.items())
        done = len(names) - len(missing)
        with (folder / "features.f16").open("ab") as features, (folder / "index.jsonl").open("a") as index:
            for start in range(0, len(missing), _BATCH):
                batch = missing[start : start + _BATCH]
                embeddings, bad = live.embed([path for _, path in batch], [mirrored] * len(batch))
                unreadable |= {name: bad[path] for name, path in batch if path in bad}
                features.write(embeddings.to(torch.float16).cpu().numpy().tobytes())
                features.flush()
                for name in (name for name, path in batch if path not in bad):
                    rows[name] = len(rows)
                    index.write(json.dumps(name) + "\n")
                index.flush()
                done += len(batch)
                if progress:
                    progress(done, len(names))
        return unreadable

    def _recover(self, folder: Path) -> dict[str, int]:
        """Return the complete rows by photo, and cut off what an interruption left half-written."""
        names: list[str] = []
        length, row_bytes = 0, self.tokens * self.width * 2
        with (folder / "features.f16").open("a+b") as features, (folder / "index.jsonl").open("a+b") as index:
            stored = features.tell() // row_bytes
            index.seek(0)
            for line in index:
                name = _name(line)
                if name is None or len(names) == stored:
                    break
                names.append(name)
                length += len(line)
            features.truncate(len(names) * row_bytes)
            index.truncate(length)
        return {name: row for row, name in enumerate(names)}


def _name(line: bytes) -> str | None:
    """Return the photo that a line of the index names, or None if the line is cut off or damaged."""
    try:
        name = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return name if isinstance(name, str) else None


def identity(path: Path) -> str:
    """Return a photo's key in the cache, which changes with the file. Raises ImageError if there is no file."""
    with reading(path, ImageError):
        stat = path.stat()
        return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"


def cache_identity(tower: VisionTower, flip: bool) -> dict[str, Any]:
    """Return everything besides the photo that embeddings depend on."""
    config = tower.folder / "config.json"  # activation and the like; an ONNX graph contains them
    return {
        "tower": tower.sha256,
        "config": hash_files([config]) if config.is_file() else None,
        "tokens": tower.tokens,
        "width": tower.width,
        "image": tower.image.model_dump(mode="json"),
        "flip": flip,
    }
