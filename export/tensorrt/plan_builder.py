"""The process that builds one TensorRT plan: `python -m itune.export.tensorrt.plan_builder REQUEST`.

It prints one JSON object per line, {"report": ...} or {"progress": ...}; an error is the last line on stderr.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ...files import atomic_path
from .library import LayerReport, Library, PlanRequest, TensorRTError

_WORKSPACE = 2 << 30
_ADDED = "ONNXTRT_"
"""Prefix of the names of tensors that the parser adds."""
_NUMPY = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8"}


class Builder:
    """Parses a graph and builds its plan."""

    def __init__(self, library: Library, request: PlanRequest) -> None:
        self.trt, self.request = library.module, request
        self.messages: list[str] = []  # the library's errors; the first is the cause
        self.logger = _logger(self.trt, self.messages)
        self.builder = self.trt.Builder(self.logger)
        # Absent from releases whose networks are always strongly typed.
        typed = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self.network = self.builder.create_network(0 if typed is None else 1 << int(typed))
        self.parser = self.trt.OnnxParser(self.network, self.logger)

    def parse(self) -> LayerReport:
        """Parse the graph; raises TensorRTError for an operator that TensorRT does not support."""
        if not self.parser.parse_from_file(str(self.request.source)):  # finds external weights beside it
            error = self.parser.get_error(0)
            reason = " ".join(error.desc().split("\n", 1)[-1].split()).split(" [checkMacros")[0]
            raise TensorRTError(
                f"node {error.node_name()}: TensorRT does not support operator {error.node_operator()}: {reason}"
            )
        return report_layers(self.trt, self.network)

    def build(self) -> Any:
        """The plan's bytes; raises TensorRTError if the profile does not fit the graph or the builder fails."""
        config = self.builder.create_builder_config()
        config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, _WORKSPACE)
        config.clear_flag(self.trt.BuilderFlag.TF32)  # which has no more digits than fp16
        if hasattr(config, "set_compute_capability"):
            config.num_compute_capabilities = len(self.request.compute_capabilities)
            for place, gpu in enumerate(self.request.compute_capabilities):
                config.set_compute_capability(getattr(self.trt.ComputeCapability, gpu.upper()), place)
        config.progress_monitor = monitor = _monitor(self.trt)  # noqa: F841  # must outlive the build
        profile = self.builder.create_optimization_profile()
        for tensor in _all(self.network.get_input, self.network.num_inputs):
            sizes = self.request.profile[tensor.name]
            set_sizes = profile.set_shape_input if tensor.is_shape_tensor else profile.set_shape
            set_sizes(tensor.name, sizes.min, sizes.opt, sizes.max)
        config.add_optimization_profile(profile)
        plan = self.builder.build_serialized_network(self.network, config)
        if plan is None:
            first = next((text for text in self.messages if "catchCudaError" not in text), "TensorRT gave no reason")
            raise no_plan(" ".join(first.split())[:300])
        return plan


def no_plan(reason: str) -> TensorRTError:
    """The error for a builder that failed for `reason`."""
    short = any(word in reason.lower() for word in ("memory", "alloc", "workspace"))
    mend = "; export smaller --max-batch and --max-beams, or use a machine with more memory" if short else ""
    return TensorRTError(f"TensorRT built no plan: {reason}{mend}")


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
        # TensorRT computes a product of dequantised values in int8.
        if layer.type in (kinds.MATRIX_MULTIPLY, kinds.CONVOLUTION) and read and read <= dequantized:
            layers["int8"] += 1
        else:
            dtype = _dtype(outputs[0])
            layers[dtype if dtype.startswith(("float", "bfloat")) or dtype == "int8" else "other"] += 1
    return LayerReport(
        layers=dict(layers),
        tensors=dict(tensors),
        weights=dict(weights),
        names={kind: sorted(found) for kind, found in names.items()},
        inputs={tensor.name: _dtype(tensor) for tensor in _all(network.get_input, network.num_inputs)},
        outputs={tensor.name: _dtype(tensor) for tensor in _all(network.get_output, network.num_outputs)},
    )


def _pattern(name: str) -> str:
    """A tensor's name without type suffixes, its layer number replaced by *: the same in every layer."""
    name = re.sub(r"(_output|\.fp16|\.fp32|\.int8|_[0-9]+)+$", "", name)
    return re.sub(r"\b[0-9]+\b", "*", name)


def _all(get: Any, count: int) -> Iterator[Any]:
    return (get(place) for place in range(count))


def _dtype(tensor: Any) -> str:
    name = str(tensor.dtype).rpartition(".")[2]
    return _NUMPY.get(name, name.lower())


def _logger(trt: Any, messages: list[str]) -> Any:
    """A logger that keeps errors; TensorRT allows one in a process."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the module is only known at run time
        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message)

    return Logger()


def _monitor(trt: Any) -> Any:
    steps: dict[str, int] = {}

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            steps[phase_name] = num_steps
            if parent_phase is None:
                _say(progress=phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            _say(progress=f"{phase_name} {step + 1}/{steps.get(phase_name, step + 1)}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def _say(**message: Any) -> None:
    # In one write: the library calls from several threads.
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main(text: str) -> None:
    """Build the requested plan."""
    request = PlanRequest.model_validate_json(text)
    try:
        builder = Builder(Library.find(), request)
        _say(report=builder.parse().model_dump())
        plan = builder.build()
        with atomic_path(request.target) as temporary:
            temporary.write_bytes(memoryview(plan))
    except TensorRTError as error:
        sys.exit(str(error))
    except MemoryError:
        sys.exit(str(no_plan("out of memory")))


if __name__ == "__main__":
    main(sys.argv[1])
