"""How far each precision may differ from PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Limits:
    """Tolerances of a precision. Differences are relative to the root mean square of the expected output."""

    measure: Literal["max", "rms"]
    outputs: float
    neighbours: float
    """Tolerance between an image alone and the same image in a batch."""
    top1: float
    """Minimum fraction of rows with the same best token."""
    captions: float
    """Minimum fraction of identical captions."""
    dev_captions: float
    """The same on a dev split: among many photos, some have two equally good captions."""
    cider: float
    """Minimum fraction of PyTorch's CIDEr-D on a dev split, after two standard errors are forgiven."""


LIMITS = {  # from the tightest to the loosest
    "fp32": Limits("max", outputs=5e-4, neighbours=5e-4, top1=0.95, captions=1.0, dev_captions=0.98, cider=0.99),
    # fp32 products of weights that were rounded to 11 bits.
    "fp16": Limits("rms", outputs=0.03, neighbours=5e-4, top1=0.75, captions=0.0, dev_captions=0.0, cider=0.97),
    # Measured: a captioner trained on Flickr8k 0.015, random GPT-2 base and large 0.037, small random models with
    # steep attention 0.12; a single fault of 0.14 to 0.16 in a small model goes unnoticed. In random models with
    # flat logits, the slightest rounding changes the best token, so top1 means little there.
    "int8": Limits("rms", outputs=0.3, neighbours=0.05, top1=0.25, captions=0.0, dev_captions=0.0, cider=0.9),
    "int4": Limits("rms", outputs=0.5, neighbours=0.05, top1=0.1, captions=0.0, dev_captions=0.0, cider=0.8),
}
