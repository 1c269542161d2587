"""The process that builds one TensorRT plan: `python -m itune.export.tensorrt.plan_builder REQUEST`.

It prints a JSON object a line: {"progress": ...}, and at the end {"plan": ...} or {"error": ...}.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from ...files import atomic_path
from ..compare.worker import peak_memory
from .library import LayerReport, Library, Plan, PlanRequest, TensorRTError

OTHER = "other"
_ADDED = "ONNXTRT_"
"""How the names of tensors begin that the parser made up."""
_NUMPY = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8"}


class Builder:
    """A graph on its way to a plan."""

    def __init__(self, library: Library, request: PlanRequest) -> None:
        self.trt, self.request = library.module, request
        self.messages: list[str] = []
        """The library's errors, the first is the cause."""
        self.logger = _logger(self.trt, self.messages)
        self.builder = self.trt.Builder(self.logger)
        flags = self.trt.NetworkDefinitionCreationFlag
        typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
        self.network = self.builder.create_network(typed)
        self.parser = self.trt.OnnxParser(self.network, self.logger)

    def parse(self) -> LayerReport:
        """Read the graph.

        Raises:
            TensorRTError: an operator, or the way it is used, is not TensorRT's.
        """
        # From its file, which external weights are beside.
        if not self.parser.parse_from_file(str(self.request.source)):
            error = self.parser.get_error(0)
            reason = " ".join(error.desc().split("\n", 1)[-1].split()).split(" [checkMacros")[0]
            raise TensorRTError(
                f"node {error.node_name()}: TensorRT cannot take operator {error.node_operator()}: {reason}"
            )
        return report_layers(self.trt, self.network)

    def build(self) -> Any:
        """The plan's bytes.

        Raises:
            TensorRTError: the profile is impossible, or the builder gave up.
        """
        config = self.builder.create_builder_config()
        config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, self.request.workspace)
        config.clear_flag(self.trt.BuilderFlag.TF32)  # no more digits than fp16, where the graph asks for fp32
        if hasattr(config, "set_compute_capability"):
            config.num_compute_capabilities = len(self.request.compute_capabilities)
            for place, gpu in enumerate(self.request.compute_capabilities):
                config.set_compute_capability(getattr(self.trt.ComputeCapability, gpu.upper()), place)
        if hasattr(self.trt, "IProgressMonitor"):
            config.progress_monitor = monitor = _monitor(self.trt)  # noqa: F841  # must outlive the build
        if config.add_optimization_profile(self.profile()) < 0:
            raise TensorRTError(f"the profile is impossible: {self.reason()}")
        plan = self.builder.build_serialized_network(self.network, config)
        if plan is None:
            raise no_plan(self.reason())
        return plan

    def profile(self) -> Any:
        """The request's profile; raises TensorRTError for an input that it lacks or does not fit."""
        profile = self.builder.create_optimization_profile()
        for tensor in (self.network.get_input(i) for i in range(self.network.num_inputs)):
            sizes = self.request.profile.get(tensor.name)
            if sizes is None:
                raise TensorRTError(f"the profile is impossible: it has no range for input {tensor.name}")
            fixed = [(size, low, high) for size, low, high in zip(tensor.shape, sizes.min, sizes.max, strict=False)]
            if tensor.is_shape_tensor:
                profile.set_shape_input(tensor.name, sizes.min, sizes.opt, sizes.max)
                continue
            if len(fixed) != len(tensor.shape) or any(size >= 0 and {size} != {low, high} for size, low, high in fixed):
                raise TensorRTError(
                    f"the profile is impossible: input {tensor.name} is {list(tensor.shape)} and not {sizes.min} to "
                    f"{sizes.max}"
                )
            profile.set_shape(tensor.name, sizes.min, sizes.opt, sizes.max)
        return profile

    def reason(self) -> str:
        """The first thing that the library complained about, in one line."""
        first = next((message for message in self.messages if "catchCudaError" not in message), "it gives no reason")
        return " ".join(first.split())[:300]


def no_plan(reason: str = "") -> TensorRTError:
    """What to say when the builder gave up for `reason`, or when there was no memory left."""
    if reason and not any(word in reason.lower() for word in ("memory", "alloc", "workspace")):
        return TensorRTError(f"no plan could be built: {reason}")
    found = f" ({reason})" if reason else ""
    return TensorRTError(
        f"not enough memory{found}: give the machine more, or export smaller --max-batch and --max-beams"
    )


def report_layers(trt: Any, network: Any) -> LayerReport:
    """Count a parsed network's layers, tensors and weights by type."""
    layers: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    names: dict[str, dict[str, None]] = {}
    dequantized: set[str] = set()
    kinds = trt.LayerType
    for layer in _all(network.get_layer, network.num_layers):
        inputs = [tensor for tensor in _all(layer.get_input, layer.num_inputs) if tensor is not None]
        outputs = list(_all(layer.get_output, layer.num_outputs))
        read = {tensor.name for tensor in inputs}
        if layer.type == kinds.CONSTANT:
            weights[_dtype(outputs[0])] += math.prod(outputs[0].shape) * outputs[0].dtype.itemsize
            continue
        tensors.update(map(_dtype, outputs))
        for tensor in outputs:
            if layer.type != kinds.DEQUANTIZE and not tensor.name.startswith(_ADDED):
                names.setdefault(_dtype(tensor), {})[_pattern(tensor.name)] = None
        if layer.type == kinds.DEQUANTIZE or (layer.type == kinds.SHUFFLE and read <= dequantized):
            dequantized.update(tensor.name for tensor in outputs)
        # A product of dequantised values is one that TensorRT computes in int8.
        if layer.type in (kinds.MATRIX_MULTIPLY, kinds.CONVOLUTION) and read and read <= dequantized:
            layers["int8"] += 1
        else:
            dtype = _dtype(outputs[0])
            layers[dtype if dtype.startswith(("float", "bfloat")) or dtype == "int8" else OTHER] += 1
    return LayerReport(
        layers=dict(layers),
        tensors=dict(tensors),
        weights=dict(weights),
        names={kind: sorted(found) for kind, found in names.items()},
        inputs={tensor.name: _dtype(tensor) for tensor in _all(network.get_input, network.num_inputs)},
        outputs={tensor.name: _dtype(tensor) for tensor in _all(network.get_output, network.num_outputs)},
    )


def _pattern(name: str) -> str:
    """A tensor's name without what made its type and without numbers: that of its like in every layer."""
    name = re.sub(r"(_output|\.fp16|\.fp32|\.int8|_[0-9]+)+$", "", name)
    return re.sub(r"\b[0-9]+\b", "*", name)


def _all(get: Any, count: int) -> Iterator[Any]:
    return (get(place) for place in range(count))


def _dtype(tensor: Any) -> str:
    name = str(tensor.dtype).rpartition(".")[2]
    return _NUMPY.get(name, name.lower())


def _logger(trt: Any, messages: list[str]) -> Any:
    """A logger that keeps errors; TensorRT wants one for the whole process."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the module is only known at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message)

    return Logger()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if parent_phase is None:
                _say(progress=phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            _say(progress=f"{phase_name} {step + 1}/{self.steps.get(phase_name, step + 1)}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _say(**message: Any) -> None:
    # In one piece: the library calls from several threads.
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main(text: str) -> None:
    """Build what the request asks for."""
    request = PlanRequest.model_validate_json(text)
    start = perf_counter()
    try:
        builder = Builder(Library.find(), request)
        report = builder.parse()
        _say(report=report.model_dump())
        plan = builder.build()
        with atomic_path(request.target) as temporary:
            temporary.write_bytes(memoryview(plan))
    except TensorRTError as error:
        _say(error=str(error))
    except MemoryError:
        _say(error=str(no_plan()))
    else:
        built = Plan(report=report, bytes=plan.nbytes, seconds=perf_counter() - start, peak_mb=peak_memory())
        _say(plan=built.model_dump())


if __name__ == "__main__":
    main(sys.argv[1])
