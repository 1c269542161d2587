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

Flavour = Literal["tensorrt", "tensorrt-rtx"]
LIBRARIES: dict[str, Flavour] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
"""Modules in order of preference, with their names in a bundle."""
_OLDEST = (10, 14)
"""The oldest release of `tensorrt` that builds these graphs."""
_BUILDER = "itune.export.tensorrt.plan_builder"
_NO_FLOAT_PRODUCTS = "sm75"
"""Turing, where tensorrt-rtx cannot multiply in fp32, as the adapters' attention and the logits need."""


class TensorRTError(ItuneError):
    """TensorRT is missing, or cannot build a plan."""


class PlanRequest(BaseModel):
    """The input of the process that builds a plan."""

    source: Path
    target: Path
    profile: dict[str, ProfileRange]
    compute_capabilities: list[str]


class LayerReport(BaseModel):
    """A graph as TensorRT parsed it, before the build."""

    layers: dict[str, int]
    """Number of layers that compute in each type; "other" has shapes, indices and masks."""
    tensors: dict[str, int]
    """Number of tensors of each type between layers."""
    names: dict[str, list[str]]
    """The tensors' names by type, without those that the parser adds; h.*/attn/Softmax is one tensor of every block."""
    weights: dict[str, int]
    """Bytes of weights of each type."""
    inputs: dict[str, str]
    """The NumPy type of each input."""
    outputs: dict[str, str]
    """The NumPy type of each output."""


@dataclass(frozen=True)
class Library:
    """The installed TensorRT."""

    module: Any
    flavour: Flavour

    @classmethod
    def find(cls) -> Library:
        """Import TensorRT; raises TensorRTError if it is missing, too old or broken."""
        problem = "TensorRT is not installed"
        name = next(filter(find_spec, LIBRARIES), None)
        if name is not None:
            with reading(name, TensorRTError, mend="--target tensorrt cannot import it"):
                module = import_module(name)
            if name != "tensorrt" or tuple(map(int, module.__version__.split(".")[:2])) >= _OLDEST:
                return cls(module, LIBRARIES[name])
            problem = f"tensorrt {module.__version__} is too old"
        raise TensorRTError(f"{problem}; --target tensorrt needs: pip install 'itune-captioner[tensorrt]'")

    @property
    def version(self) -> str:
        """The module's version."""
        return str(self.module.__version__)

    @property
    def known_gpus(self) -> list[str]:
        """The compute capabilities that it can build for: at least this machine's GPU, if there is one."""
        if not hasattr(self.module.IBuilderConfig, "set_compute_capability"):
            import torch

            gpus = [torch.cuda.get_device_capability()] if torch.cuda.is_available() else []
            return [f"sm{major}{minor}" for major, minor in gpus]
        members = (name.lower() for name in self.module.ComputeCapability.__members__ if name.startswith("SM"))
        return sorted((name for name in members if name != _NO_FLOAT_PRODUCTS), key=lambda name: int(name[2:]))

    def choose_gpus(self, wanted: str | None) -> list[str]:
        """Parse `--gpu`, a list such as "sm86,sm89"; by default all that are known, which makes a plan no larger."""
        known = self.known_gpus
        gpus = list(dict.fromkeys(part.strip().lower() for part in (wanted or ",".join(known)).split(",")))
        if not set(gpus) <= set(known):
            targets = ", ".join(known) or "this machine's GPU, and there is none: use tensorrt-rtx"
            raise TensorRTError(f"--gpu {wanted or 'default'}: {self.flavour} {self.version} builds only for {targets}")
        return gpus


def build_plan(request: PlanRequest, progress: Callable[[str], None], report: Callable[[LayerReport], None]) -> None:
    """Build a plan in a process of its own; calls `report` once the graph is parsed.

    Raises:
        TensorRTError: TensorRT cannot build it.
    """

    def receive(line: str) -> None:
        message = json.loads(line) if line.startswith("{") else {}  # the library prints, too
        if "progress" in message:
            progress(f"building {request.target.name}: {message['progress']}")
        elif "report" in message:
            report(LayerReport.model_validate(message["report"]))

    run_module(_BUILDER, request.model_dump_json(), about=request.source.name, error=TensorRTError, receive=receive)


def layer_table(name: str, report: LayerReport, *, names: bool = True) -> Table:
    """A graph's layer report as a table with a row for every type, and with the `names` of its tensors."""
    table = Table(title=f"{name} in TensorRT", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("type", "layers", "tensors", "weights"):
        table.add_column(header, justify="left" if header == "type" else "right", no_wrap=True)
    if names:
        table.add_column("tensor names")
    for kind in dict.fromkeys([*report.layers, *report.tensors, *report.weights]):
        weights = report.weights.get(kind, 0)
        counts = (str(counted.get(kind, "")) for counted in (report.layers, report.tensors))
        size = f"{weights / 1e6:.1f} MB" if weights >= 1e5 else ""
        blocks: dict[str, list[str]] = {}
        for tensor in report.names.get(kind, []):
            block, slash, last = tensor.rpartition("/")
            blocks.setdefault(f"{block}: " if slash else "", []).append(last)
        joined = "; ".join(block + " ".join(found) for block, found in blocks.items())  # h.*/attn: Add Softmax; ...
        table.add_row(kind, *counts, size, *([joined] if names else []), end_section=True)
    return table
