"""Visual embeddings of training photos: computed on demand, or computed once and memory-mapped.

The tower is frozen, so a photo's embeddings never change: `--cache-features` keeps them in half precision, in a
subfolder per tower, preprocessing and mirroring.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from ..backbones import VisionTower
from ..files import hash_files, refuse_link, write_json
from ..progress import OnProgress, silent
from ..runtime.engines.base import UInt8
from ..runtime.errors import ImageError, ItuneError, reading
from ..runtime.image import decode, preprocess

_BATCH = 16  # photos per forward pass of the tower


class Features:
    """The visual embeddings of photos, computed by the tower at every read."""

    def __init__(self, tower: VisionTower) -> None:
        self.tower, self.tokens, self.width = tower, tower.tokens, tower.width
        self._pool = ThreadPoolExecutor(2)

    def prepare(self, images: Sequence[Path], *, flip: bool = False, progress: OnProgress = silent) -> dict[Path, str]:
        """Prepare photos for `read`, and with `flip` their mirror images; return the unreadable ones and why.

        Decodes every photo once, so that training starts without unreadable ones.
        """
        del flip  # mirroring needs no preparation here
        unreadable: dict[Path, str] = {}
        for done, (path, pixels) in enumerate(zip(images, self._pool.map(self.pixels, images), strict=True), 1):
            if isinstance(pixels, str):
                unreadable[path] = pixels
            progress(done, len(images))
        return unreadable

    def read(self, images: Sequence[Path], flip: Sequence[bool] = ()) -> Tensor:
        """Return the embeddings [images, tokens, width] of prepared photos, mirrored where `flip` is True.

        Raises ImageError if one cannot be read.
        """
        embeddings, unreadable = self.embed(images, flip)
        if unreadable:
            raise ImageError(next(iter(unreadable.values())))
        return embeddings

    def embed(self, images: Sequence[Path], flip: Sequence[bool] = ()) -> tuple[Tensor, dict[Path, str]]:
        """Return the embeddings of the readable photos, and the unreadable ones with the reasons."""
        decoded = list(self._pool.map(self.pixels, images))
        unreadable = {path: p for path, p in zip(images, decoded, strict=True) if isinstance(p, str)}
        flips = flip or [False] * len(images)
        pixels = [p[:, ::-1] if side else p for p, side in zip(decoded, flips, strict=True) if not isinstance(p, str)]
        if not pixels:
            return torch.empty(0, self.tokens, self.width), unreadable
        return self.tower.embed(np.stack(pixels)), unreadable

    def pixels(self, path: Path) -> UInt8 | str:
        """Return a photo's preprocessed pixels [H, W, 3], or the reason why it cannot be decoded."""
        try:
            return preprocess(decode(path), self.tower.image)
        except ImageError as error:
            return str(error)


class FeatureCache(Features):
    """Embeddings in one fp16 file per tower, preprocessing and mirroring; several processes may share it.

    `features.f16` contains rows [tokens, width]; line i of `index.jsonl` is [photo, i, CRC-32 of both]. A row counts
    once its line is complete, so an interrupted build continues where it stopped; from a line on that is out of order,
    or names a photo twice, nothing counts. One process at a time appends. Plain files, because HDF5 files break when a
    writer is killed, and zarr and safetensors need a file per chunk.
    """

    def __init__(self, folder: Path, tower: VisionTower) -> None:
        super().__init__(tower)
        self.folder = folder
        # By path and not by `identity`: a photo that changes during the run keeps the row that was computed for it.
        self._rows: dict[tuple[Path, bool], int] = {}
        self._maps: dict[bool, NDArray[np.float16]] = {}
        self._checksums: dict[tuple[bool, int], tuple[str, int]] = {}
        """Names and checksums of the rows that were not read yet; caches of earlier versions have none."""
        self._unreadable: dict[Path, str] = {}

    def prepare(self, images: Sequence[Path], *, flip: bool = False, progress: OnProgress = silent) -> dict[Path, str]:
        """Compute the embeddings that are missing."""
        names: dict[Path, str] = {}
        unreadable: dict[Path, str] = {}
        for path in images:
            try:
                names[path] = identity(path)
            except ImageError as error:
                unreadable[path] = str(error)
        for mirrored in (False, True) if flip else (False,):
            unreadable |= self._complete(names, mirrored, progress)
        self._unreadable |= unreadable
        return unreadable

    def embed(self, images: Sequence[Path], flip: Sequence[bool] = ()) -> tuple[Tensor, dict[Path, str]]:
        """Return the embeddings of photos as `prepare` saw them, and the photos that it could not read.

        Raises ItuneError if the cache is damaged.
        """
        places = list(zip(images, flip or [False] * len(images), strict=True))
        unreadable = {path: self._unreadable[path] for path, side in places if (path, side) not in self._rows}
        rows = [self._row(side, self._rows[path, side]) for path, side in places if path not in unreadable]
        stacked = np.stack(rows) if rows else np.empty((0, self.tokens, self.width), np.float16)
        return torch.from_numpy(stacked).float(), unreadable

    def _row(self, mirrored: bool, row: int) -> NDArray[np.float16]:
        embedding: NDArray[np.float16] = self._maps[mirrored][row]
        expected = self._checksums.pop((mirrored, row), None)  # each row is checked when it is read first
        if expected is not None and _checksum(expected[0], embedding) != expected[1]:
            raise ItuneError(f"--cache-features {self.folder}: is damaged: delete it, and it is computed again")
        return embedding

    def _complete(self, names: dict[Path, str], mirrored: bool, progress: OnProgress) -> dict[Path, str]:
        """Add the rows that the file lacks, and map it; return the unreadable photos and why."""
        content = _content(self.tower, mirrored)
        folder = self.folder / hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        with reading(f"--cache-features {self.folder}", mend="choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("", "lock", "features.f16", "index.jsonl"):
                refuse_link(folder / name)
        with FileLock(folder / "lock"):
            write_json(folder / "tower.json", content)
            rows, checksums = self._recover(folder)
            unreadable = self._append(folder, names, mirrored, rows, progress)
        photos = {row: name for name, row in rows.items()}
        self._checksums |= {(mirrored, row): (photos[row], checksum) for row, checksum in checksums.items()}
        self._rows |= {(path, mirrored): rows[name] for path, name in names.items() if name in rows}
        if rows:  # an empty file cannot be mapped
            shape = (len(rows), self.tokens, self.width)
            self._maps[mirrored] = np.memmap(folder / "features.f16", np.float16, mode="r", shape=shape)
        return {path: unreadable[name] for path, name in names.items() if name in unreadable}

    def _append(
        self, folder: Path, names: dict[Path, str], mirrored: bool, rows: dict[str, int], progress: OnProgress
    ) -> dict[str, str]:
        """Embed the photos that are not in `rows` and add them to it; return the unreadable ones and why."""
        unreadable: dict[str, str] = {}
        missing = list({name: path for path, name in names.items() if name not in rows}.items())
        done = len(names) - len(missing)
        files = folder / "features.f16", folder / "index.jsonl"
        with (
            reading(f"--cache-features {folder}", mend="make room, or choose another folder"),
            files[0].open("ab") as features,
            files[1].open("a") as index,
        ):
            for start in range(0, len(missing), _BATCH):
                batch = missing[start : start + _BATCH]
                embeddings, bad = super().embed([path for _, path in batch], [mirrored] * len(batch))
                unreadable |= {name: bad[path] for name, path in batch if path in bad}
                halves = embeddings.to(torch.float16).cpu().numpy()
                if not np.isfinite(halves).all():
                    raise ItuneError(
                        f"--cache-features {self.folder}: embeddings from {batch[0][1]} on reach "
                        f"{float(embeddings.abs().max()):g}, but half precision ends at 65504: train without it"
                    )
                features.write(halves.tobytes())
                features.flush()
                for half, name in zip(halves, (name for name, path in batch if path not in bad), strict=True):
                    index.write(json.dumps([name, len(rows), _checksum(name, half)]) + "\n")
                    rows[name] = len(rows)
                index.flush()
                progress(done + start + len(batch), len(names))
        return unreadable

    def _recover(self, folder: Path) -> tuple[dict[str, int], dict[int, int]]:
        """Return the rows by photo and the checksums by row, and cut off what an interruption left half-written."""
        rows: dict[str, int] = {}
        checksums: dict[int, int] = {}
        length, row_bytes = 0, self.tokens * self.width * 2
        files = folder / "features.f16", folder / "index.jsonl"
        with files[0].open("a+b") as features, files[1].open("a+b") as index:
            stored = features.tell() // row_bytes
            index.seek(0)
            with suppress(ValueError, TypeError, RecursionError):  # no index line: nothing counts from there on
                for line in index:
                    found = json.loads(line)
                    name, row, checksum = (found, len(rows), None) if isinstance(found, str) else found
                    typed = isinstance(name, str) and type(row) is int and type(checksum) in (int, type(None))
                    if not (typed and name not in rows and row == len(rows) < stored and line.endswith(b"\n")):
                        break
                    rows[name] = row
                    if checksum is not None:
                        checksums[row] = checksum
                    length += len(line)
            features.truncate(len(rows) * row_bytes)
            index.truncate(length)
        return rows, checksums


def _checksum(photo: str, embedding: NDArray[np.float16]) -> int:
    return zlib.crc32(embedding.tobytes(), zlib.crc32(photo.encode("utf-8", "surrogateescape")))


def identity(path: Path) -> str:
    """Return a photo's key in the cache, which changes with the file. Raises ImageError if there is no file."""
    with reading(path, ImageError):
        stat = path.stat()
        return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"


def _content(tower: VisionTower, flip: bool) -> dict[str, Any]:
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
