"""A TensorRT plan: the library it was built with, what its profiles allow, and one run of it.

`tensorrt` and `tensorrt_rtx` have the same Python API as far as it is used here; nothing imports either of them
before a plan is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from ..bundle import MANIFEST, Bundle, GraphEntry, PlanSettings, ProfileRange
from ..errors import BundleError, EngineError, SearchError

NAME = "tensorrt"
PACKAGES = {"tensorrt": "tensorrt-cu12", "tensorrt-rtx": "tensorrt-rtx-cu12"}
"""What to install for each flavour of plan; the module is called like the flavour."""
Sizes = Mapping[str, Sequence[int]]
"""By an input's name: its shape, or the values of a shape input (`k`)."""
Profiles = Sequence[Mapping[str, ProfileRange]]


def has_plans(bundle: Bundle) -> bool:
    """Whether a bundle was exported for TensorRT."""
    return any(graph.engine == NAME for graph in bundle.manifest.graphs)


def plan_graph(bundle: Bundle, role: str) -> tuple[GraphEntry, PlanSettings]:
    """A bundle's plan of `role` and how it was built; raises BundleError if there is none."""
    for graph in bundle.manifest.graphs:
        if graph.role == role and graph.engine == NAME and graph.plan is not None:
            return graph, graph.plan
    raise BundleError(
        f"{bundle.folder / MANIFEST}: graphs: no TensorRT plan of the {role}; export it with --target tensorrt, "
        f"or run it with --engine onnxruntime"
    )


def import_tensorrt(plan: PlanSettings, label: str) -> Any:
    """The module that built a plan, in its very version: no other reads it.

    Raises:
        EngineError: it is not installed, or in another version.
    """
    package = f"pip install {PACKAGES[plan.flavour]}=={plan.version}"
    try:
        trt = import_module(plan.flavour.replace("-", "_"))
    except Exception as error:  # a library that it loads may be missing, too, which is no ImportError in every release
        reason = str(error).strip().split("\n")[0]
        raise EngineError(
            f"{label} was built with {plan.flavour} {plan.version}, which cannot be imported ({reason}): {package}"
        ) from None
    if trt.__version__ != plan.version:
        raise EngineError(
            f"{label} was built with {plan.flavour} {plan.version}, and {trt.__version__} is installed: {package}, "
            f"or export it again"
        )
    return trt


def check_capability(plan: PlanSettings, capability: str, label: str) -> None:
    """Raise EngineError unless a plan was built for GPUs like this one."""
    if capability not in plan.compute_capabilities:
        raise EngineError(
            f"{label} was built for {', '.join(plan.compute_capabilities)}, and the GPU here is {capability}: "
            f"export it again with --gpu {capability}"
        )


@cache
def _log(trt: Any) -> Any:
    """The process's one logger (TensorRT keeps the first it is given): it remembers an error instead of printing."""

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
    """A plan that was loaded, with an execution context for each of its optimisation profiles."""

    def __init__(self, trt: Any, content: bytes, graph: GraphEntry, profiles: Profiles, label: str) -> None:
        """`content`: the bytes of the plan; `label`: how sentences call it.

        Raises:
            EngineError: TensorRT cannot load it here.
            BundleError: its inputs and outputs are not those of the manifest.
        """
        self._trt, self.label, self.profiles = trt, label, profiles
        self.inputs = {spec.name: np.dtype(spec.dtype) for spec in graph.inputs}
        self.outputs = {spec.name: np.dtype(spec.dtype) for spec in graph.outputs}
        self._runtime = trt.Runtime(_log(trt))
        _log(trt).error = ""
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise EngineError(
                f"{label}: {trt.__name__} {trt.__version__} cannot load it here{_last_error(trt)}: it was built for "
                f"another GPU or by another version, or no GPU can be used; export it again on this machine"
            )
        self._check()
        self._cuda_graphs = False
        self._contexts: dict[int, Any] = {}
        self._addresses: dict[int, dict[str, int]] = {}

    def _check(self) -> None:
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        expected = self.inputs | self.outputs
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise BundleError(
                    f"{self.label}: {name!r} is {found.get(name, 'not there')}, and {expected.get(name, 'not there')} "
                    f"in {MANIFEST}; export the bundle again"
                )
        if engine.num_optimization_profiles != len(self.profiles):
            raise BundleError(
                f"{self.label} has {engine.num_optimization_profiles} optimisation profiles, and {MANIFEST} "
                f"{len(self.profiles)}; export the bundle again"
            )
        self.host_inputs = {name for name in self.inputs if engine.get_tensor_location(name) == trt.TensorLocation.HOST}

    def use_cuda_graphs(self, wanted: bool) -> None:
        """Have the library replay whole runs as CUDA graphs; before the first run.

        Only TensorRT-RTX can, by itself and for the shapes it has specialised its kernels for. A step captured here
        would be bound to one past length and one side of the cache, and a context whose shapes change loses what was
        captured with it: that is a context, with its memory, for each past length, number of rows and of images, which
        nobody has measured. So TensorRT goes without.
        """
        self._cuda_graphs = wanted and hasattr(self._trt, "CudaGraphStrategy")

    def run(self, sizes: Sizes, addresses: Mapping[str, int], stream: int) -> None:
        """Enqueue one run: `addresses` of every input and output, those of `host_inputs` in host memory.

        Raises:
            SearchError: no profile allows the sizes.
            EngineError: TensorRT refused them, or failed.
        """
        profile = choose_profile(self.profiles, sizes)
        if profile is None:
            raise SearchError(_misfit(self.profiles, sizes, self.label))
        context = self._context(profile, stream)
        for name in self.inputs:
            if name not in self.host_inputs and not context.set_input_shape(name, tuple(sizes[name])):
                raise EngineError(f"{self.label}: {name} cannot be {list(sizes[name])}{_last_error(self._trt)}")
        known = self._addresses[profile]
        for name, address in addresses.items():
            if known.get(name) != address:
                context.set_tensor_address(name, address)
                known[name] = address
        if not context.execute_async_v3(stream):
            raise EngineError(f"{self.label}: TensorRT could not run it{_last_error(self._trt)}")

    def _context(self, profile: int, stream: int) -> Any:
        if profile in self._contexts:
            return self._contexts[profile]
        if self._cuda_graphs:
            config = self._engine.create_runtime_config()
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise EngineError(
                f"{self.label}: TensorRT cannot prepare to run it{_last_error(self._trt)}: the GPU may lack memory"
            )
        if not context.set_optimization_profile_async(profile, stream):
            raise EngineError(f"{self.label}: TensorRT refused profile {profile}{_last_error(self._trt)}")
        self._contexts[profile], self._addresses[profile] = context, {}
        return context


def choose_profile(profiles: Profiles, sizes: Sizes) -> int | None:
    """The first profile that allows `sizes`; None if none does."""
    for index, profile in enumerate(profiles):
        if not _outside(profile, sizes):
            return index
    return None


def largest(profiles: Profiles, name: str) -> list[int]:
    """The most that an input can be in any profile, each dimension by itself."""
    return [max(sizes) for sizes in zip(*(profile[name].max for profile in profiles), strict=True)]


def _outside(profile: Mapping[str, ProfileRange], sizes: Sizes) -> list[str]:
    """The inputs that a profile does not allow."""
    return [
        name
        for name, allowed in profile.items()
        if len(allowed.min) != len(sizes[name])
        or any(not low <= size <= high for low, size, high in zip(allowed.min, sizes[name], allowed.max, strict=True))
    ]


def _misfit(profiles: Profiles, sizes: Sizes, label: str) -> str:
    profile = min(profiles, key=lambda each: len(_outside(each, sizes)))
    name = _outside(profile, sizes)[0]
    allowed = profile[name]
    return (
        f"{label}: no optimisation profile allows {name} {list(sizes[name])} (the nearest: {allowed.min} to "
        f"{allowed.max}); export it again with larger --max-batch, --max-beams or --max-new-tokens"
    )
