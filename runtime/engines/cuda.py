"""Memory, copies and a stream on an NVIDIA GPU: all that the TensorRT engine asks of CUDA, by way of cuda-bindings."""

from __future__ import annotations

import ctypes
import sys
import weakref
from contextlib import suppress
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from ..errors import EngineError
from .base import UInt8

_MODULE = "cuda.bindings.runtime"
_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


class Memory(Protocol):
    """Bytes on the device; they are freed with this object."""

    @property
    def address(self) -> int:
        """Where they begin, aligned to 256 bytes at least."""
        ...


class HostMemory(Protocol):
    """Page-locked bytes on the host, which the device reads and writes without a copy between; freed with this."""

    @property
    def array(self) -> UInt8:
        """The bytes [size]. A view of them does not keep them."""
        ...


class Device(Protocol):
    """A GPU. Copies are ordered on its one stream and return before they are done."""

    @property
    def capability(self) -> str:
        """Its compute capability, such as "sm86"."""
        ...

    @property
    def stream(self) -> int:
        """The handle of the stream."""
        ...

    def allocate(self, size: int) -> Memory:
        """Memory on the device."""
        ...

    def allocate_host(self, size: int) -> HostMemory:
        """Page-locked memory on the host."""
        ...

    def upload(self, source: UInt8, target: int) -> None:
        """Copy contiguous host bytes to an address on the device."""
        ...

    def download(self, source: int, target: UInt8) -> None:
        """Copy bytes at an address on the device into contiguous host bytes."""
        ...

    def copy(self, source: int, target: int, size: int) -> None:
        """Copy bytes on the device; the two must not overlap."""
        ...

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        ...


class CudaDevice:
    """The first GPU that CUDA shows this process (`CUDA_VISIBLE_DEVICES` chooses another).

    Raises:
        EngineError: cuda-bindings is not installed, there is no driver, or no GPU.
    """

    def __init__(self) -> None:
        try:
            self._cuda = import_module(_MODULE)
        except ImportError as error:
            if not _has_driver():  # then installing it would not help
                raise EngineError(f"there is no NVIDIA GPU with a working driver here ({_DRIVER} is missing)") from None
            raise EngineError(
                f"TensorRT needs {_MODULE}, which cannot be imported ({error}): pip install 'itune[tensorrt]'"
            ) from None
        try:
            count = self._call("cudaGetDeviceCount")
        except EngineError as error:
            raise EngineError(f"there is no NVIDIA GPU with a working driver here ({error})") from None
        except RuntimeError as error:  # a driver library that cannot be loaded
            raise EngineError(f"there is no NVIDIA driver here ({error})") from None
        if not count:
            raise EngineError("there is no NVIDIA GPU here")
        attributes = self._cuda.cudaDeviceAttr
        major, minor = (
            self._call("cudaDeviceGetAttribute", attribute, 0)
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        self.capability = f"sm{major}{minor}"
        # Not the default stream, where TensorRT would wait for the whole device at every run.
        self._stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def allocate(self, size: int) -> Memory:
        """See `Device.allocate`."""
        return _DeviceMemory(self._cuda, self._call("cudaMalloc", max(size, 1)))

    def allocate_host(self, size: int) -> HostMemory:
        """See `Device.allocate_host`."""
        return _PinnedMemory(self._cuda, self._call("cudaHostAlloc", max(size, 1), 0), size)

    def upload(self, source: UInt8, target: int) -> None:
        """See `Device.upload`."""
        self._copy(target, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice")

    def download(self, source: int, target: UInt8) -> None:
        """See `Device.download`."""
        self._copy(target.ctypes.data, source, target.nbytes, "cudaMemcpyDeviceToHost")

    def copy(self, source: int, target: int, size: int) -> None:
        """See `Device.copy`."""
        self._copy(target, source, size, "cudaMemcpyDeviceToDevice")

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        self._call("cudaStreamSynchronize", self._stream)

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        self._call("cudaMemcpyAsync", target, source, size, getattr(self._cuda.cudaMemcpyKind, kind), self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """What a function of the CUDA runtime gives besides its status."""
        status, *values = getattr(self._cuda, name)(*arguments)
        if status != self._cuda.cudaError_t.cudaSuccess:
            _, text = self._cuda.cudaGetErrorString(status)
            raise EngineError(f"{name}: {text.decode() if isinstance(text, bytes) else text}")
        return values[0] if values else None


class _DeviceMemory:
    def __init__(self, cuda: Any, address: Any) -> None:
        self.address = int(address)
        weakref.finalize(self, _free, cuda.cudaFree, address).atexit = False  # the process takes it along


class _PinnedMemory:
    def __init__(self, cuda: Any, address: Any, size: int) -> None:
        self.array: UInt8 = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))
        weakref.finalize(self, _free, cuda.cudaFreeHost, address).atexit = False


def _free(function: Any, address: Any) -> None:
    with suppress(Exception):  # whoever let go of the memory could do nothing about it
        function(address)


def _has_driver() -> bool:
    """Whether NVIDIA's driver is installed."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True
