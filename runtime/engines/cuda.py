"""Memory, copies and a stream on an NVIDIA GPU: all that the TensorRT engine needs of CUDA, through cuda-bindings."""

from __future__ import annotations

import ctypes
import sys
import weakref
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import EngineError
from .base import UInt8

_MODULE = "cuda.bindings.runtime"
_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


class Memory:
    """Bytes on the device, freed with this object."""

    def __init__(self, cuda: Any, address: Any) -> None:
        self.address = int(address)
        """Aligned to at least 256 bytes."""
        weakref.finalize(self, cuda.cudaFree, address).atexit = False  # the process frees it anyway


class HostMemory:
    """Page-locked bytes on the host, which the device reads and writes directly; freed with this object."""

    def __init__(self, cuda: Any, address: Any, size: int) -> None:
        self.array: UInt8 = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))
        """The bytes [size]. A view of them does not keep them alive."""
        weakref.finalize(self, cuda.cudaFreeHost, address).atexit = False


class CudaDevice:
    """The first GPU that CUDA shows this process (`CUDA_VISIBLE_DEVICES` chooses another).

    Copies are ordered on its one stream and return before they are done.

    Raises:
        EngineError: cuda-bindings is not installed, there is no driver, or no GPU.
    """

    def __init__(self) -> None:
        try:
            self._cuda = import_module(_MODULE)
            count, problem = self._call("cudaGetDeviceCount"), "CUDA finds no device"
        except ImportError as error:
            if _has_driver():  # else installing it would not help
                raise EngineError(
                    f"TensorRT needs {_MODULE}, which cannot be imported ({error}): pip install "
                    "'itune-captioner[tensorrt]'"
                ) from None
            count, problem = 0, f"{_DRIVER} is missing"
        except (EngineError, RuntimeError) as error:  # RuntimeError: the driver's library cannot be loaded
            count, problem = 0, str(error)
        if not count:
            raise EngineError(f"there is no NVIDIA GPU with a working driver here ({problem})")
        attributes = self._cuda.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, 0)
        self.capability = f"sm{major}{minor}"
        """The compute capability, such as "sm86"."""
        # Not the default stream, where TensorRT would wait for the whole device at every run.
        self._stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.stream = int(self._stream)
        """The handle of the stream."""

    def allocate(self, size: int) -> Memory:
        """Allocate memory on the device."""
        return Memory(self._cuda, self._call("cudaMalloc", max(size, 1)))

    def allocate_host(self, size: int) -> HostMemory:
        """Allocate page-locked memory on the host."""
        return HostMemory(self._cuda, self._call("cudaHostAlloc", max(size, 1), 0), size)

    def upload(self, source: UInt8, target: int) -> None:
        """Copy contiguous host bytes to an address on the device."""
        self._copy(target, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice")

    def download(self, source: int, target: UInt8) -> None:
        """Copy bytes at an address on the device into contiguous host bytes."""
        self._copy(target.ctypes.data, source, target.nbytes, "cudaMemcpyDeviceToHost")

    def copy(self, source: int, target: int, size: int) -> None:
        """Copy bytes on the device; the two ranges must not overlap."""
        self._copy(target, source, size, "cudaMemcpyDeviceToDevice")

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        self._call("cudaStreamSynchronize", self._stream)

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        self._call("cudaMemcpyAsync", target, source, size, getattr(self._cuda.cudaMemcpyKind, kind), self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; returns its value without the status."""
        status, *values = getattr(self._cuda, name)(*arguments)
        if status != self._cuda.cudaError_t.cudaSuccess:
            _, text = self._cuda.cudaGetErrorString(status)
            raise EngineError(f"{name}: {text.decode() if isinstance(text, bytes) else text}")
        return values[0] if values else None


def _has_driver() -> bool:
    """Whether NVIDIA's driver is installed."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True
