"""Read weight files, safetensors or torch's, without running code from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor

Shapes = Mapping[str, Sequence[int]]
"""The shapes of tensors by their names."""


def read_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:  # noqa: ARG005
    """The tensors of a file whose names are `wanted`. What a library raises on a damaged file passes unchanged."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    return {name: tensor for name, tensor in _load(path, "cpu").items() if wanted(name)}


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of a file's tensors, without their values."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {name: list(tensor.shape) for name, tensor in _load(path, "meta").items()}


def _load(path: Path, device: str) -> dict[str, Tensor]:
    with warnings.catch_warnings(action="ignore"):  # about pickles that torch did not write
        # Only torch's present format, a zip archive, can be mapped.
        try:
            content = torch.load(path, map_location=device, mmap=is_zipfile(path), weights_only=True)
        except UnpicklingError as error:  # torch would advise to run whatever code is in it
            raise ValueError("is no file of tensors alone") from error
    return {name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, Tensor)}


def misfit(found: Mapping[str, Tensor], shapes: Shapes) -> str | None:
    """What is wrong with the first of the `found` tensors that has another name, shape or type, or is not finite."""
    for name in (*sorted(found.keys() ^ shapes.keys()), *sorted(found)):
        tensor = found.get(name)
        if tensor is None:
            return f"tensor {name} is missing"
        if name not in shapes:
            return f"tensor {name} is unknown"
        if list(tensor.shape) != list(shapes[name]):
            return f"tensor {name} has shape {list(tensor.shape)}, expected {list(shapes[name])}"
        if tensor.layout is not torch.strided or not tensor.is_floating_point() or tensor.is_meta:
            return f"tensor {name} has type {tensor.dtype}, {tensor.layout}, {tensor.device}"
        if not tensor.isfinite().all():
            return f"tensor {name} has values that are not finite"
    return None
