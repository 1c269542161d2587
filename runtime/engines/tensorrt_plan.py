"""A TensorRT plan: the library that built it, what its profiles allow, and one run of it.

`tensorrt` and `tensorrt_rtx` have the same Python API as far as it is used here. Nothing imports either of them before
a plan is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import MANIFEST, Bundle, GraphEntry, PlanSettings, ProfileRange
from ..errors import BundleError, EngineError, SearchError, reason

NAME = "tensorrt"
Sizes = Mapping[str, Sequence[int]]
"""For each input its shape, or the values of a shape input (`k`)."""
Profiles = Sequence[Mapping[str, ProfileRange]]


def plan_graph(bundle: Bundle, role: str) -> tuple[GraphEntry, PlanSettings]:
    """A bundle's plan for `role` and how it was built; raises BundleError if there is none."""
    graph = bundle.graph(role, NAME)
    if graph.plan is None:
        raise BundleError(
            f"{bundle.folder / MANIFEST}: graphs: no TensorRT plan of the {role}; export it with --target tensorrt, "
            f"or run it with --engine onnxruntime"
        )
    return graph, graph.plan


def _import(plan: PlanSettings, label: str) -> Any:
    """The module that built a plan, in exactly its version: no other can read it."""
    try:
        trt = import_module(plan.flavour.replace("-", "_"))
        problem = f"{trt.__version__} is installed"
    except Exception as error:  # a library that it loads may be missing, too, which is not always an ImportError
        trt, problem = None, f"which cannot be imported ({reason(error)})"
    if trt is None or trt.__version__ != plan.version:
        raise EngineError(
            f"{label} was built with {plan.flavour} {plan.version}, {problem}: "
            f"pip install {plan.flavour}-cu12=={plan.version}, or export it again"
        )
    return trt


@cache
def _log(trt: Any) -> Any:
    """The process's only logger (TensorRT keeps the first): it remembers an error instead of printing it."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.error = self.error or " ".join(message.split())  # the first is the cause

    return Log()


def _last_error(trt: Any) -> str:
    found = f" ({_log(trt).error})" if _log(trt).error else ""
    _log(trt).error = ""
    return found


class Plan:
    """A loaded plan, with an execution context for each of its optimisation profiles."""

    def __init__(
        self, path: Path, graph: GraphEntry, built: PlanSettings, capability: str, cuda_graphs: bool = False
    ) -> None:
        """`capability` is the GPU's ("sm86"); `cuda_graphs` replays whole runs as CUDA graphs, where the library can.

        Only TensorRT-RTX does this by itself, for the shapes that it has specialised its kernels for. With TensorRT, a
        captured step would be bound to one past length and one side of the cache, and a context loses it when its
        shapes change: it would take a context, with its memory, for each past length, number of rows and of images.

        Raises:
            EngineError: it was built for other GPUs, the library that built it is not here, or cannot load it.
            BundleError: it is not the plan that the manifest describes.
        """
        self.label = label = str(path)
        if capability not in built.compute_capabilities:
            raise EngineError(
                f"{label} was built for {', '.join(built.compute_capabilities)}, but the GPU here is {capability}: "
                f"export it again with --gpu {capability}"
            )
        self._trt, self.profiles = trt, profiles = _import(built, label), built.profiles
        self.inputs = {spec.name: np.dtype(spec.dtype) for spec in graph.inputs}
        self.outputs = {spec.name: np.dtype(spec.dtype) for spec in graph.outputs}
        self._runtime = trt.Runtime(_log(trt))
        _log(trt).error = ""
        self._engine = engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineError(
                f"{label}: {trt.__name__} {trt.__version__} cannot load it here{_last_error(trt)}: it was built for "
                f"another GPU or by another version, or no GPU is usable; export it again on this machine"
            )
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = {(name, np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name) for name in names}
        expected = {(name, dtype.name) for name, dtype in (self.inputs | self.outputs).items()}
        profiled = [set(self.inputs)] * engine.num_optimization_profiles
        if found != expected or [set(profile) for profile in profiles] != profiled:
            raise BundleError(
                f"{label}: it has {sorted(found - expected)} and {len(profiled)} profiles, but {MANIFEST} describes "
                f"{sorted(expected - found)} and {len(profiles)} profiles; export the bundle again"
            )
        self.host_inputs = {name for name in self.inputs if engine.get_tensor_location(name) == trt.TensorLocation.HOST}
        self._cuda_graphs = cuda_graphs and hasattr(trt, "CudaGraphStrategy")
        self._contexts: dict[int, tuple[Any, dict[str, int]]] = {}  # with the addresses that each knows

    def run(self, sizes: Sizes, addresses: Mapping[str, int], stream: int) -> None:
        """Enqueue one run: `addresses` of every input and output, those of `host_inputs` in host memory.

        Raises:
            SearchError: no profile allows the sizes.
            EngineError: TensorRT refused them, or failed.
        """
        profile = choose_profile(self.profiles, sizes, self.label)
        context, known = self._context(profile, stream)
        shaped = all(
            context.set_input_shape(name, tuple(sizes[name])) for name in self.inputs if name not in self.host_inputs
        )
        for name, address in addresses.items():
            if known.get(name) != address:
                context.set_tensor_address(name, address)
                known[name] = address
        if not shaped or not context.execute_async_v3(stream):
            raise EngineError(f"{self.label}: TensorRT cannot run it with {dict(sizes)}{_last_error(self._trt)}")

    def _context(self, profile: int, stream: int) -> tuple[Any, dict[str, int]]:
        if profile not in self._contexts:
            arguments = []
            if self._cuda_graphs:
                config = self._engine.create_runtime_config()
                config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                arguments = [config]
            context = self._engine.create_execution_context(*arguments)
            if context is None or not context.set_optimization_profile_async(profile, stream):
                problem = f"TensorRT cannot prepare profile {profile}{_last_error(self._trt)}"
                raise EngineError(f"{self.label}: {problem}: the GPU may lack memory")
            self._contexts[profile] = context, {}
        return self._contexts[profile]


def choose_profile(profiles: Profiles, sizes: Sizes, label: str) -> int:
    """The first profile that allows `sizes`; raises SearchError if none does. `label`: the plan's name in messages."""
    outside = [_outside(profile, sizes) for profile in profiles]
    if [] in outside:
        return outside.index([])
    nearest = min(range(len(profiles)), key=lambda index: len(outside[index]))
    name = outside[nearest][0]
    allowed = profiles[nearest][name]
    raise SearchError(
        f"{label}: no optimisation profile allows {name} {list(sizes[name])} (the nearest: {allowed.min} to "
        f"{allowed.max}); export it again with larger --max-batch, --max-beams or --max-new-tokens"
    )


def largest(profiles: Profiles, name: str) -> list[int]:
    """The maximum of each dimension of an input over all profiles."""
    return [max(sizes) for sizes in zip(*(profile[name].max for profile in profiles), strict=True)]


def _outside(profile: Mapping[str, ProfileRange], sizes: Sizes) -> list[str]:
    """The inputs that a profile does not allow."""
    return [
        name
        for name, allowed in profile.items()
        if len(allowed.min) != len(sizes[name])
        or any(not low <= size <= high for low, size, high in zip(allowed.min, sizes[name], allowed.max, strict=True))
    ]
