"""Measure contestants in turns, and summarise the measurements."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from artifacts import BASE, console
from contestants import ContestantProcess, Sample, Task
from numpy.typing import NDArray
from rich.progress import Progress

from itune.runtime.cpus import available_cpus
from itune.runtime.engines.base import UInt8

PARTS = ("encode", "decode", "total")
_PACKAGES = (
    *("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu12", "openvino", "nncf"),
    *("ctranslate2", "numpy", "itune"),
)
Samples = dict[str, list[Sample]]


def batches(pixels: UInt8, size: int, minimum: int) -> list[UInt8]:
    """At least `minimum` batches of `size` photos, cycling through pixels [photos, H, W, 3]; each photo occurs."""
    count = max(minimum, -(-len(pixels) // size))
    return [pixels[np.arange(i * size, (i + 1) * size) % len(pixels)] for i in range(count)]


def measure(workers: dict[str, ContestantProcess], photos: list[UInt8], task: Task, warmup: int) -> Samples:
    """One sample per batch and contestant, alternating, after `warmup` batches that do not count."""
    samples: Samples = {name: [] for name in workers}
    with Progress(console=console, transient=True) as progress:
        for number in progress.track(range(-warmup, len(photos)), description="captioning"):
            for name, worker in workers.items():
                sample = worker.caption(photos[number % len(photos)], task)
                if number >= 0:
                    samples[name].append(sample)
                time.sleep(0.05)  # let its threads go to sleep before the next one starts
    return samples


def milliseconds(samples: list[Sample], part: str) -> NDArray[np.float64]:
    """One part of every sample's time; NaN for a part that a contestant does not do."""
    encode, decode = (np.array([getattr(s, name) for s in samples], np.float64) for name in PARTS[:2])
    return {"encode": encode, "decode": decode, "total": encode + decode}[part]


def summarize(samples: Samples, photos: int) -> dict[str, dict[str, Any]]:
    """Per contestant: median, p95 and spread of each part, ratios to eager PyTorch, captions that equal eager's.

    `photos`: the number of distinct photos, before the batches repeat.
    """
    summary: dict[str, dict[str, Any]] = {}
    expected = _captions(samples[BASE], photos)
    for name, own in samples.items():
        row: dict[str, Any] = {}
        for part in PARTS:
            ms, others = milliseconds(own, part), milliseconds(samples[BASE], part)
            if np.isnan(ms).any():
                continue
            pairs = others / ms  # the same photos, one contestant right after the other
            row[part] = {
                "median_ms": float(np.median(ms)),
                "p95_ms": float(np.percentile(ms, 95)),
                "min_ms": float(ms.min()),
                "max_ms": float(ms.max()),
                "speedup": float(np.median(others) / np.median(ms)),
                "speedup_p10_p90": [float(p) for p in np.percentile(pairs, (10, 90))],
            }
        if "total" in row:
            row["images_per_s"] = 1e3 * len(own[0].tokens) / row["total"]["median_ms"]
            captions = _captions(own, photos)
            row["identical_captions"] = sum(a == b for a, b in zip(captions, expected, strict=True))
            row["distinct_captions"] = len(set(captions))
        summary[name] = row
    return summary


def machine(threads: int) -> dict[str, Any]:
    """The machine, the versions of the libraries, and the date."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": available_cpus(),
        "threads": threads,
        "gpu": _gpu(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _gpu() -> str | None:
    """The first NVIDIA GPU and its driver."""
    if not (tool := shutil.which("nvidia-smi")):
        return None
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return found[0] if found else None


def _captions(samples: list[Sample], photos: int) -> list[tuple[int, ...]]:
    return [tokens for sample in samples for tokens in sample.tokens][:photos]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
