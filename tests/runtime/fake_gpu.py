"""A GPU and a TensorRT made of NumPy and ONNX Runtime: a "plan" is an ONNX graph, device memory is host memory.

As on a real stream, nothing happens before `synchronize`, so a buffer that is reused too early shows. Every address is
checked: it must lie in memory that is allocated and not yet freed.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import onnxruntime as ort

STREAM = 7
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}


class FakeMemory:
    """Filled with bytes that are NaN as floats."""

    def __init__(self, size: int) -> None:
        self._whole = np.full(size + 256, 0xFF, np.uint8)
        self.array = self._whole[-self._whole.ctypes.data % 256 :][:size]
        self.address = self.array.ctypes.data


class FakeDevice:
    capability, stream = "sm86", STREAM

    def __init__(self) -> None:
        self.memories: weakref.WeakSet[FakeMemory] = weakref.WeakSet()
        self.queue: list[Callable[[], None]] = []
        self.copied = 0

    def allocate(self, size: int) -> FakeMemory:
        memory = FakeMemory(size)
        self.memories.add(memory)
        return memory

    def allocate_host(self, size: int) -> FakeMemory:
        return FakeMemory(size)

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        for memory in self.memories:
            offset = address - memory.address
            if offset >= 0 and offset + size <= len(memory.array):
                return memory.array[offset : offset + size]
        raise AssertionError(f"{size} bytes at {address} are not on the device")

    def upload(self, source: np.ndarray, target: int) -> None:
        self.queue.append(lambda: np.copyto(self.bytes_at(target, source.nbytes), source))

    def download(self, source: int, target: np.ndarray) -> None:
        self.copied += target.nbytes
        self.queue.append(lambda: np.copyto(target, self.bytes_at(source, target.nbytes)))

    def copy(self, source: int, target: int, size: int) -> None:
        assert abs(source - target) >= size, "the two overlap"
        self.queue.append(lambda: np.copyto(self.bytes_at(target, size), self.bytes_at(source, size)))

    def synchronize(self) -> None:
        while self.queue:
            self.queue.pop(0)()


class _Severity(Enum):
    INTERNAL_ERROR, ERROR, INFO = range(3)


class _Logger:
    Severity = _Severity


class _Location(Enum):
    DEVICE, HOST = range(2)


class _CudaGraphStrategy(Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class FakeTensorRT:
    """The module, as far as the engine uses it."""

    ILogger, TensorLocation, CudaGraphStrategy = _Logger, _Location, _CudaGraphStrategy

    def __init__(self, device: FakeDevice, name: str = "tensorrt_rtx", version: str = "1.7.1.116") -> None:
        self.device, self.__name__, self.__version__ = device, name, version
        self.refuses: str | None = None
        self.profiles = {"vision": 1, "decoder": 2}
        self.contexts: list[FakeContext] = []

    def Runtime(self, logger: Any) -> FakeRuntime:  # noqa: N802
        return FakeRuntime(self, logger)

    @staticmethod
    def nptype(dtype: Any) -> Any:
        return dtype


class FakeRuntime:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, content: bytes) -> FakeEngine | None:
        if self.trt.refuses:
            self.logger.log(_Severity.ERROR, self.trt.refuses)
            return None
        return FakeEngine(self.trt, content)


class FakeEngine:
    def __init__(self, trt: FakeTensorRT, content: bytes) -> None:
        self.trt = trt
        self.session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: TYPES[value.type] for value in self.session.get_inputs()}
        self.outputs = {value.name: TYPES[value.type] for value in self.session.get_outputs()}
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.num_optimization_profiles = trt.profiles["decoder" if "k" in self.inputs else "vision"]

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_dtype(self, name: str) -> Any:
        return (self.inputs | self.outputs)[name]

    def get_tensor_location(self, name: str) -> _Location:
        return _Location.HOST if name == "k" else _Location.DEVICE

    def create_runtime_config(self) -> Any:
        return type("Config", (), {"cuda_graph_strategy": _CudaGraphStrategy.DISABLED})()

    def create_execution_context(self, config: Any = None) -> FakeContext:
        context = FakeContext(self, config)
        self.trt.contexts.append(context)
        return context


class FakeContext:
    def __init__(self, engine: FakeEngine, config: Any) -> None:
        self.engine, self.config, self.profile, self.runs = engine, config, -1, 0
        self.shapes: dict[str, tuple[int, ...]] = {"k": (1,)}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        others = {c.profile for c in self.engine.trt.contexts if c.engine is self.engine and c is not self}
        assert stream == STREAM
        assert profile < self.engine.num_optimization_profiles
        assert profile not in others, "two contexts cannot share a profile"
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self.engine.inputs
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % (1 if name == "k" else 256) == 0
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        engine, shapes, addresses = self.engine, dict(self.shapes), dict(self.addresses)
        assert addresses.keys() == engine.inputs.keys() | engine.outputs.keys()
        host = {}
        if "k" in engine.inputs:  # a shape input is read when the run is enqueued
            host["k"] = np.array([ctypes.c_int64.from_address(addresses["k"]).value])
        self.runs += 1

        def run() -> None:
            device, read = engine.trt.device, {}
            for name, dtype in engine.inputs.items():
                if name not in host:
                    size = int(np.prod(shapes[name])) * np.dtype(dtype).itemsize
                    read[name] = device.bytes_at(addresses[name], size)
            feed = {name: value.view(engine.inputs[name]).reshape(shapes[name]) for name, value in read.items()}
            results = engine.session.run(list(engine.outputs), feed | host)
            for name, result in zip(engine.outputs, results, strict=True):
                target = device.bytes_at(addresses[name], result.nbytes)
                assert not any(np.shares_memory(target, source) for source in read.values()), f"{name} is an input, too"
                target[:] = np.ascontiguousarray(result).reshape(-1).view(np.uint8)

        engine.trt.device.queue.append(run)
        return True
