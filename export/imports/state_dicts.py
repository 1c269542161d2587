"""State dicts of other codebases: read without running anything in them, and held to what a model's weights are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...checkpoint import CheckpointError

State = Mapping[str, Tensor]


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict (.pt, .bin, .safetensors); nothing else in the file is looked at, let alone run.

    Raises:
        CheckpointError: there is no such file, or it is something else.
    """
    if file.is_dir():
        raise CheckpointError(f"--import {file}: is a folder: name the file with the weights in it")
    try:
        state = load_file(file) if file.suffix == ".safetensors" else _load_pickle(file)
    except FileNotFoundError:
        raise CheckpointError(f"--import {file}: does not exist") from None
    except UnpicklingError:
        raise CheckpointError(
            f"--import {file}: holds more than tensors, which could be code and is not read; save the model's "
            "state_dict() alone"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"--import {file}: is not a state dict: {reason}") from None
    tensors = {name: each for name, each in state.items() if isinstance(name, str) and isinstance(each, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"--import {file}: has no tensors, unless deeper inside; save the model's state_dict() alone"
        )
    return tensors


def _load_pickle(file: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings(action="ignore"):  # of pickles that torch did not write, which fail or hold no code
        found = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    return found


def weight(file: Path, name: str, tensor: Tensor, dimensions: int) -> Tensor:
    """`tensor` in float32. Raises CheckpointError where no trained weight of so many dimensions is like it."""
    if tensor.ndim != dimensions or 0 in tensor.shape:
        odd = f"has shape {list(tensor.shape)}"
    elif tensor.layout is not torch.strided or not tensor.is_floating_point():
        odd = f"is {tensor.dtype if tensor.layout is torch.strided else tensor.layout}"
    elif not tensor.isfinite().all():
        odd = "holds numbers that are not finite"
    else:
        return tensor.float()
    raise CheckpointError(f"--import {file}: its tensor {name} {odd}, unlike a trained model's")


def fitted(file: Path, found: State, expected: State, spelled: Callable[[str], str]) -> dict[str, Tensor]:
    """`found`, in float32, which has the names and shapes of `expected`; `spelled` is a name as the file has it.

    Raises:
        CheckpointError: it has not.
    """
    if odd := sorted(expected.keys() ^ found.keys()):
        lacks = odd[0] in expected
        raise CheckpointError(
            f"--import {file}: {'lacks' if lacks else 'has'} the tensor {spelled(odd[0])}, which "
            f"{'belongs' if lacks else 'does not belong'} to its others"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"--import {file}: its tensor {spelled(name)} makes one of {list(tensor.shape)}, where its others ask "
                f"for {list(expected[name].shape)}"
            )
    return {name: weight(file, spelled(name), tensor, expected[name].ndim) for name, tensor in found.items()}
