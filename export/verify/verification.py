"""Verify a bundle against its checkpoint.

Each side is a process of its own, so that only one model is in memory at a time; they share a temporary folder.

    python -m itune.export.verify.verification reference CHECKPOINT FOLDER [IMAGES]   records all outputs in PyTorch
    python -m itune.export.verify.verification compare BUNDLE FOLDER                  replays them on ONNX Runtime
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ...data.records import Record
from ...runtime.bundle import Bundle
from ...runtime.engines.base import Int64
from ...runtime.errors import ItuneError
from ..process import run_module
from .captions import write_dev_split
from .report import CHECKS, Check, VerificationError

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
    with TemporaryDirectory(prefix="itune-verify-") as folder:
        if vocabulary is not None:
            np.save(Path(folder) / _SHORTLIST, vocabulary)
        if dev:
            write_dev_split(dev, Bundle.load(bundle, verify=False).manifest.search, Path(folder))
        photos = f", with {len(dev)} dev photos" if dev else ""
        progress(f"computing references in PyTorch{photos}")
        run_module(__name__, "reference", checkpoint, folder, *([images] if images else []), error=_failed)
        progress(f"running the graphs{photos}")
        run_module(__name__, "compare", bundle, folder, error=_failed)
        return CHECKS.validate_json((Path(folder) / _REPORT).read_bytes())


def _failed(reason: str) -> VerificationError:
    return VerificationError(f"verification: {reason}")


def main(side: str, source: str, folder: str, images: str | None = None) -> None:
    """Run one side; the imports keep torch out of the other."""
    if side == "reference":
        from .reference import write_reference

        shortlist = np.load(Path(folder) / _SHORTLIST) if (Path(folder) / _SHORTLIST).exists() else None
        write_reference(Path(source), Path(folder), Path(images) if images else None, shortlist)
    else:
        from .compare import compare

        (Path(folder) / _REPORT).write_bytes(CHECKS.dump_json(compare(Path(source), Path(folder))))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ItuneError as error:
        sys.exit(str(error))
