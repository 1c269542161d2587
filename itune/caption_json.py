"""The JSON object of a photo, as `itune-run --json` and `itune-serve` write it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .runtime.caption import Caption
from .runtime.errors import ItuneError


def caption_json(image: str, result: Caption | ItuneError, engine: str, kernels: str | None) -> dict[str, Any]:
    """The fields of a caption and what computed it, or the photo's error; `image` is its name."""
    if isinstance(result, ItuneError):
        return {"image": image, "error": str(result)}
    record = {"image": image, **asdict(result), "engine": engine, "kernels": kernels}
    del record["picture"]  # for notebooks
    return {name: value for name, value in record.items() if value is not None or name not in ("retrieved", "kernels")}
