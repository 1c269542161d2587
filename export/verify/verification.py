"""Verify a bundle against its checkpoint.

Each side is a process of its own, so that only one model is in memory at a time; they share a temporary folder.

    python -m itune.export.verify.verification reference CHECKPOINT FOLDER [IMAGES]   records all outputs in PyTorch
    python -m itune.export.verify.verification compare BUNDLE FOLDER                  replays them on ONNX Runtime
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ...data.records import Record
from ...runtime.bundle import Bundle
from ...runtime.engines.base import Int64
from ...runtime.errors import ItuneError
from ..process import run_module
from .captions import caption_dev_split, write_dev_split
from .compare import compare
from .report import CHECKS, Check, VerificationError
from .scenarios import REFERENCE, Reference, caption_images, pick_images, record, replay

_REPORT, _SHORTLIST = "report.json", "shortlist.npy"


def verify_bundle(
    checkpoint: Path,
    bundle: Path,
    *,
    images: Path | None = None,
    dev: Sequence[Record] = (),
    vocabulary: Int64 | None = None,
    progress: Callable[[str], None] = lambda _stage: None,
) -> list[Check]:
    """Compare a bundle's graphs with its checkpoint; the caller decides by `Check.passed`.

    `images` is a folder of photos to use besides synthetic images. Both sides caption the photos of `dev` with the
    bundle's search defaults and are scored. `vocabulary` has the token ids of a decoder with a shortlist.

    Raises:
        VerificationError: one side cannot run, or an output has the wrong shape or is not finite.
    """
    with TemporaryDirectory(prefix=".verify-", dir=bundle) as folder:  # swept with a bundle that was never finished
        if vocabulary is not None:
            np.save(Path(folder) / _SHORTLIST, vocabulary)
        if dev:
            write_dev_split(dev, Bundle.load(bundle, verify=False).manifest.search, Path(folder))
        photos = f", with {len(dev)} dev photos" if dev else ""
        run = partial(run_module, __name__, about="verification", error=VerificationError)
        progress(f"computing references in PyTorch{photos}")
        run("reference", checkpoint, folder, *([images] if images else []))
        progress(f"running the graphs{photos}")
        run("compare", bundle, folder)
        return CHECKS.validate_json((Path(folder) / _REPORT).read_bytes())


def write_reference(checkpoint: Path, folder: Path, images: Path | None = None, shortlist: Int64 | None = None) -> None:
    """Record the scenarios and caption the images with a checkpoint; keep all outputs in `folder`."""
    from ...loading import LoadedCheckpoint, eager_captioner  # torch, which the other side runs without

    loaded = LoadedCheckpoint.load(checkpoint)
    captioner = eager_captioner(loaded, shortlist)
    vocabulary = np.arange(captioner.tokens.vocab_size) if shortlist is None else shortlist
    pixels = pick_images(loaded.config.image, images)
    scenarios = record(captioner.engine, pixels, captioner.tokens, vocabulary)
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "vocabulary.npy", vocabulary)
    for i, scenario in enumerate(scenarios):
        outputs = replay(captioner.engine, pixels, scenario, vocabulary)
        np.savez(folder / f"{i}.npz", **outputs)  # type: ignore[arg-type]  # no output is named allow_pickle
    reference = Reference(
        scenarios=scenarios, captions=caption_images(captioner, pixels), dev=caption_dev_split(captioner, folder)
    )
    (folder / REFERENCE).write_text(reference.model_dump_json(), encoding="utf-8")


def main(side: str, source: str, folder: str, images: str | None = None) -> None:
    """Run one side."""
    shortlist = Path(folder) / _SHORTLIST
    if side == "reference":
        vocabulary = np.load(shortlist) if shortlist.exists() else None
        write_reference(Path(source), Path(folder), Path(images) if images else None, vocabulary)
    else:
        (Path(folder) / _REPORT).write_bytes(CHECKS.dump_json(compare(Path(source), Path(folder))))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ItuneError as error:
        sys.exit(str(error))
