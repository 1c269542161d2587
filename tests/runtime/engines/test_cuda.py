"""The calls to CUDA, against a fake runtime library that needs no GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
from enum import Enum
from typing import Any

import numpy as np
import pytest

from itune.runtime.engines import cuda as cuda_module
from itune.runtime.engines.cuda import CudaDevice
from itune.runtime.errors import EngineError

MODULE = "cuda.bindings.runtime"


class _Status(Enum):
    cudaSuccess, cudaErrorMemoryAllocation, cudaErrorInsufficientDriver = 0, 2, 35  # noqa: N815


class _Kind(Enum):
    cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice = 1, 2, 3  # noqa: N815


class _Attribute(Enum):
    cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor = 75, 76  # noqa: N815


class FakeCuda:
    """`cuda.bindings.runtime` as far as it is used: every function gives a status and its values."""

    cudaError_t, cudaMemcpyKind, cudaDeviceAttr = _Status, _Kind, _Attribute  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815

    def __init__(self, devices: int | None = 1) -> None:
        self.devices = devices
        self.memory: dict[int, Any] = {}
        self.waited = 0

    def cudaGetDeviceCount(self):  # noqa: N802
        if self.devices is None:
            return _Status.cudaErrorInsufficientDriver, None
        return _Status.cudaSuccess, self.devices

    def cudaGetErrorString(self, status):  # noqa: N802
        return _Status.cudaSuccess, f"{status.name} in words".encode()

    def cudaDeviceGetAttribute(self, attribute, device):  # noqa: N802
        return _Status.cudaSuccess, {75: 8, 76: 9}[attribute.value]

    def cudaStreamCreateWithFlags(self, flags):  # noqa: N802
        assert flags == 1
        return _Status.cudaSuccess, 5

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        self.waited += stream == 5
        return (_Status.cudaSuccess,)

    def cudaMalloc(self, size):  # noqa: N802
        if size > 1 << 20:
            return _Status.cudaErrorMemoryAllocation, None
        memory = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(memory)] = memory
        return _Status.cudaSuccess, ctypes.addressof(memory)

    def cudaHostAlloc(self, size, flags):  # noqa: N802
        return self.cudaMalloc(size)

    def cudaFree(self, address):  # noqa: N802
        del self.memory[address]
        return (_Status.cudaSuccess,)

    cudaFreeHost = cudaFree  # noqa: N815

    def cudaMemcpyAsync(self, target, source, size, kind, stream):  # noqa: N802
        assert stream == 5
        for address, on_device in ((source, kind is not _Kind.cudaMemcpyHostToDevice), (target, kind.value != 2)):
            assert not on_device or any(start <= address < start + len(m) for start, m in self.memory.items())
        ctypes.memmove(target, source, size)
        return (_Status.cudaSuccess,)


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, MODULE, fake)
    return fake


def test_bytes_go_up_across_and_down(cuda):
    device = CudaDevice()
    assert (device.capability, device.stream) == ("sm89", 5)
    first, second, host = device.allocate(16), device.allocate(16), device.allocate_host(16)
    host.array[:] = range(16)
    device.upload(host.array[4:12], first.address)
    device.copy(first.address, second.address + 8, 8)
    received = np.zeros(4, np.uint8)
    device.download(second.address + 10, received)
    device.synchronize()
    assert received.tolist() == [6, 7, 8, 9]
    assert cuda.waited == 1


def test_memory_is_freed_with_its_object(cuda):
    device = CudaDevice()
    memories = [device.allocate(0), device.allocate_host(8)]
    assert len(cuda.memory) == 2
    del memories
    gc.collect()
    assert not cuda.memory


def test_too_little_memory_is_one_sentence(cuda):
    with pytest.raises(EngineError) as error:
        CudaDevice().allocate(1 << 30)
    assert str(error.value) == "cudaMalloc: cudaErrorMemoryAllocation in words"


@pytest.mark.parametrize(("devices", "value"), [(None, "cudaErrorInsufficientDriver in words"), (0, "no device")])
def test_no_gpu(devices, value, cuda):
    cuda.devices = devices
    with pytest.raises(EngineError) as error:
        CudaDevice()
    assert value in str(error.value)


def test_no_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, None)
    monkeypatch.setattr(cuda_module, "_has_driver", lambda: False)
    with pytest.raises(EngineError) as error:
        CudaDevice()
    assert "libcuda" in str(error.value)
    monkeypatch.setattr(cuda_module, "_has_driver", lambda: True)
    with pytest.raises(EngineError) as error:
        CudaDevice()
    assert MODULE in str(error.value)
    assert "itune-captioner[tensorrt]" in str(error.value)


def test_the_fake_has_nothing_that_the_bindings_lack():
    real = pytest.importorskip(MODULE)
    used = [name for name in vars(FakeCuda) if name.startswith("cuda")]
    assert [name for name in used if not hasattr(real, name)] == []
    for name, members in (("cudaError_t", _Status), ("cudaMemcpyKind", _Kind), ("cudaDeviceAttr", _Attribute)):
        assert {member.name: member.value for member in members} == {
            member.name: int(getattr(getattr(real, name), member.name)) for member in members
        }
