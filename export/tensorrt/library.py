"""TensorRT plans from ONNX graphs: which library, which GPUs, and a build in a process of its own.

`tensorrt` and `tensorrt_rtx` have the same builder; the latter also builds for GPUs that are not in the machine.
The build runs in `export.plan_builder`, so that its memory is bounded and the builder's crash is one sentence.
"""

from __future__ import annotations

import json
import subprocess
import sys
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
from ...runtime.errors import ItuneError

LIBRARIES: dict[str, Literal["tensorrt", "tensorrt-rtx"]] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
"""Modules, the first that can be imported is taken, and what a bundle calls them."""
OLDEST = (10, 14)
"""The first release of `tensorrt` whose strongly typed parser this was written for."""
_NO_FLOAT_PRODUCTS = ("sm75",)
"""tensorrt-rtx computes no fp32 products on Turing, and the adapters' attention and the logits are such."""
_WORKSPACE = 2 << 30


class TensorRTError(ItuneError):
    """TensorRT is missing, or cannot build a plan."""


class PlanRequest(BaseModel):
    """What the building process is told."""

    source: Path
    target: Path
    profile: dict[str, ProfileRange]
    compute_capabilities: list[str]
    workspace: int = _WORKSPACE


class LayerReport(BaseModel):
    """What a graph became in TensorRT, before it is built."""

    layers: dict[str, int]
    """How many layers compute in each precision; "other" is shapes, indices and masks."""
    tensors: dict[str, int]
    """How many tensors between layers are of each type."""
    names: dict[str, list[str]]
    """Which they are, but for those that the parser adds; "h.*/attn/Softmax" is that of any layer."""
    weights: dict[str, int]
    """Bytes of weights of each type."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    """The plan's inputs and outputs with their types, as NumPy spells them."""


class Plan(BaseModel):
    """A plan that was built."""

    report: LayerReport
    bytes: int
    seconds: float
    peak_mb: float
    """Largest resident memory of the building process."""


@dataclass(frozen=True)
class Library:
    """The TensorRT that is installed."""

    module: Any
    flavour: Literal["tensorrt", "tensorrt-rtx"]

    @classmethod
    def find(cls) -> Library:
        """Import TensorRT.

        Raises:
            TensorRTError: there is none, or it is too old.
        """
        for name, flavour in LIBRARIES.items():
            if find_spec(name) is None:
                continue
            try:
                module = import_module(name)
            except Exception as error:  # a missing shared library, a refused platform
                raise TensorRTError(f"{name} is installed but cannot be imported: {_line(error)}") from None
            version = tuple(int(part) for part in module.__version__.split(".")[:2])
            if flavour == "tensorrt" and version < OLDEST:
                raise TensorRTError(f"tensorrt {module.__version__} is too old: install 10.14 or newer")
            return cls(module, flavour)
        raise TensorRTError("TensorRT is not installed; --target tensorrt needs: pip install 'itune[tensorrt]'")

    @property
    def version(self) -> str:
        """As the module gives it."""
        return str(self.module.__version__)

    @property
    def known_gpus(self) -> list[str]:
        """The compute capabilities that plans can be built for here; none where it is this machine's GPU alone."""
        if not hasattr(self.module.IBuilderConfig, "set_compute_capability"):
            return []
        members = (name.lower() for name in self.module.ComputeCapability.__members__ if name.startswith("SM"))
        members = (name for name in members if name not in _NO_FLOAT_PRODUCTS)
        return sorted(members, key=lambda name: int(name[2:]))

    def choose_gpus(self, wanted: str | None) -> list[str]:
        """Understand `--gpu`, a list such as "sm86,sm89"; None is all that one plan can be for, at no cost in size.

        Raises:
            TensorRTError: a compute capability is unknown, or this library builds for the machine's own GPU only.
        """
        known = self.known_gpus
        if not known:
            return [_own_gpu(wanted)]
        gpus = list(dict.fromkeys(part.strip().lower() for part in (wanted or ",".join(known)).split(",")))
        if unknown := [gpu for gpu in gpus if gpu not in known]:
            raise TensorRTError(
                f"--gpu {wanted}: {unknown[0]!r} is no compute capability that {self.flavour} {self.version} builds "
                f"for; it knows {', '.join(known)}"
            )
        return gpus


def build_plan(
    request: PlanRequest,
    progress: Callable[[str], None] = lambda _stage: None,
    report: Callable[[LayerReport], None] = lambda _report: None,
) -> Plan:
    """Build a plan in a process of its own; `report` is told what the graph became before the building begins.

    Raises:
        TensorRTError: an operator that TensorRT does not have, an impossible profile, or not enough memory.
    """
    with subprocess.Popen(_command(request), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            return _follow(process, request, progress, report)
        finally:
            process.kill()


def _command(request: PlanRequest) -> list[str]:
    return [sys.executable, "-m", "itune.export.tensorrt.plan_builder", request.model_dump_json()]


def _follow(
    process: subprocess.Popen[str],
    request: PlanRequest,
    progress: Callable[[str], None],
    report: Callable[[LayerReport], None],
) -> Plan:
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if not line.startswith("{"):  # the library may print, too
            continue
        message = json.loads(line)
        if "progress" in message:
            progress(f"building {request.target.name}: {message['progress']}")
        elif "error" in message:
            raise TensorRTError(f"{request.source.name}: {message['error']}")
        elif "plan" in message:
            return Plan.model_validate(message["plan"])
        elif "report" in message:
            report(LayerReport.model_validate(message["report"]))
    said = process.stderr.read().strip().splitlines()
    status = process.wait()
    if status < 0:
        raise TensorRTError(
            f"{request.source.name}: the building process was killed by signal {-status}, perhaps for want of memory: "
            "give the machine more, or export smaller --max-batch and --max-beams"
        )
    raise TensorRTError(f"{request.source.name}: the building process ended without a plan: {(said or ['?'])[-1]}")


def layer_table(name: str, report: LayerReport) -> Table:
    """The layer report of a graph as a table, a line for every type: what it has in numbers, and which tensors."""
    table = Table(title=f"{name} in TensorRT", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("type", "layers", "tensors", "weights"):
        table.add_column(header, justify="left" if header == "type" else "right", no_wrap=True)
    table.add_column("which tensors")
    for kind in dict.fromkeys([*report.layers, *report.tensors, *report.weights]):
        weights = report.weights.get(kind, 0)
        counts = (str(counted.get(kind, "")) for counted in (report.layers, report.tensors))
        size = f"{weights / 1e6:.1f} MB" if weights >= 1e5 else ""
        table.add_row(kind, *counts, size, _by_block(report.names.get(kind, [])), end_section=True)
    return table


def _by_block(names: list[str]) -> str:
    """Names with those of one block behind each other: "h.*/attn: Add Softmax"."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        block, _, last = name.rpartition("/")
        blocks.setdefault(block, []).append(last)
    return "; ".join(f"{block}: {' '.join(found)}" if block else " ".join(found) for block, found in blocks.items())


def _own_gpu(wanted: str | None) -> str:
    import torch

    if not torch.cuda.is_available():
        raise TensorRTError("tensorrt builds on the GPU that the plan is for, and there is none here: use tensorrt-rtx")
    major, minor = torch.cuda.get_device_capability()
    own = f"sm{major}{minor}"
    if wanted not in (None, own):
        raise TensorRTError(f"--gpu {wanted}: this tensorrt builds for the machine's own GPU only, {own}")
    return own


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
