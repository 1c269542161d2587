"""The reference side of a verification: eager PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...loading import LoadedCheckpoint, eager_captioner
from ...runtime.engines.base import Int64
from .captions import caption_dev_split
from .scenarios import REFERENCE, Reference, caption_images, pick_images, record, replay


def write_reference(checkpoint: Path, folder: Path, images: Path | None = None, shortlist: Int64 | None = None) -> None:
    """Record the scenarios and caption the images with a checkpoint; keep all outputs in `folder`."""
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
