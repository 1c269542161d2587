"""The installed TensorRT, the GPUs it builds for, and plan builds in a process of their own.

`tensorrt` and `tensorrt_rtx` have the same builder; the latter also builds for GPUs that are not in the machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from rich import box
from rich.table import Table

from ...runtime.bundle import ProfileRange
from ...runtime.errors import ItuneError, reading
from ..process import run_module

LIBRARIES: dict[str, Literal["tensorrt", "tensorrt-rtx"]] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
"""Modules in order of preference, with their names in a bundle."""
OLDEST = (10, 14)
"""The first release of `tensorrt` whose strongly typed parser this was written for."""
_BUILDER = "itune.export.tensorrt.plan_builder"
_NO_FLOAT_PRODUCTS = "sm75"
"""Turing, where tensorrt-rtx cannot multiply in fp32, as the adapters' attention and the logits need."""


class TensorRTError(ItuneError):
    """TensorRT is missing, or cannot build a plan."""


class PlanRequest(BaseModel):
    """The input of the building process."""

    source: Path
    target: Path
    profile: dict[str, ProfileRange]
    compute_capabilities: list[str]


class LayerReport(BaseModel):
    """A graph as TensorRT parsed it, before the build."""

    layers: dict[str, int]
    """Number of layers that compute in each precision; "other" has shapes, indices and masks."""
    tensors: dict[str, int]
    """Number of tensors of each type between layers."""
    names: dict[str, list[str]]
    """Their names, without those the parser adds; "h.*/attn/Softmax" stands for that tensor of every layer."""
    weights: dict[str, int]
    """Bytes of weights of each type."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    """The plan's inputs and outputs with their NumPy types."""


@dataclass(frozen=True)
class Library:
    """The TensorRT that is installed."""

    module: Any
    flavour: Literal["tensorrt", "tensorrt-rtx"]

    @classmethod
    def find(cls) -> Library:
        """Import TensorRT; raises TensorRTError if it is missing, too old or broken."""
        problem = "TensorRT is not installed"
        for name, flavour in LIBRARIES.items():
            if find_spec(name) is None:
                continue
            with reading(name, TensorRTError, mend="--target tensorrt cannot import it"):  # such as a missing library
                module = import_module(name)
            if flavour != "tensorrt" or tuple(map(int, module.__version__.split(".")[:2])) >= OLDEST:
                return cls(module, flavour)
            problem = f"tensorrt {module.__version__} is too old"
            break
        raise TensorRTError(f"{problem}; --target tensorrt needs: pip install 'itune[tensorrt]'")

    @property
    def version(self) -> str:
        """The module's version."""
        return str(self.module.__version__)

    @property
    def known_gpus(self) -> list[str]:
        """The compute capabilities it can build for; empty if it builds for this machine's GPU only."""
        if not hasattr(self.module.IBuilderConfig, "set_compute_capability"):
            return []
        members = (name.lower() for name in self.module.ComputeCapability.__members__ if name.startswith("SM"))
        return sorted((name for name in members if name != _NO_FLOAT_PRODUCTS), key=lambda name: int(name[2:]))

    def choose_gpus(self, wanted: str | None) -> list[str]:
        """Parse `--gpu`, a list such as "sm86,sm89"; by default all that one plan can serve, which adds no size."""
        known = self.known_gpus or _own_gpu()
        gpus = list(dict.fromkeys(part.strip().lower() for part in (wanted or ",".join(known)).split(",")))
        if not set(gpus) <= set(known):
            targets = ", ".join(known) or "this machine's GPU, and there is none: use tensorrt-rtx"
            raise TensorRTError(f"--gpu {wanted or 'default'}: {self.flavour} {self.version} builds only for {targets}")
        return gpus


def _own_gpu() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    return [f"sm{major}{minor}"]


def build_plan(request: PlanRequest, progress: Callable[[str], None], report: Callable[[LayerReport], None]) -> None:
    """Build a plan in a process of its own, after calling `report`; raises TensorRTError if TensorRT cannot."""

    def receive(line: str) -> None:
        message = json.loads(line) if line.startswith("{") else {}  # the library may print, too
        if "progress" in message:
            progress(f"building {request.target.name}: {message['progress']}")
        elif "report" in message:
            report(LayerReport.model_validate(message["report"]))

    run_module(_BUILDER, request.model_dump_json(), about=request.source.name, error=TensorRTError, receive=receive)


def layer_table(name: str, report: LayerReport) -> Table:
    """The layer report of a graph as a table with a line for every type."""
    table = Table(title=f"{name} in TensorRT", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("type", "layers", "tensors", "weights"):
        table.add_column(header, justify="left" if header == "type" else "right", no_wrap=True)
    table.add_column("tensor names")
    for kind in dict.fromkeys([*report.layers, *report.tensors, *report.weights]):
        weights = report.weights.get(kind, 0)
        counts = (str(counted.get(kind, "")) for counted in (report.layers, report.tensors))
        size = f"{weights / 1e6:.1f} MB" if weights >= 1e5 else ""
        table.add_row(kind, *counts, size, _by_block(report.names.get(kind, [])), end_section=True)
    return table


def _by_block(names: list[str]) -> str:
    """Names grouped by block: "h.*/attn: Add Softmax"."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        block, _, last = name.rpartition("/")
        blocks.setdefault(block, []).append(last)
    return "; ".join(f"{block}: {' '.join(found)}" if block else " ".join(found) for block, found in blocks.items())
