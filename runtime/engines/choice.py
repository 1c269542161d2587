"""Which engine runs a bundle here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..bundle import Bundle, TokenSettings
from ..errors import EngineError
from .base import Engine
from .tensorrt_plan import has_plans


class Loaded(NamedTuple):
    """An engine with a bundle in it."""

    engine: Engine[Any]
    name: str
    """"tensorrt", "onnxruntime-cuda" or "onnxruntime"."""
    tokens: TokenSettings
    """The bundle's, with the positions that this engine has."""
    notice: str | None = None
    """What the choice was, if it was one and is not the plain case of the CPU."""


def load_engine(bundle: Bundle, name: str, threads: int | None = None) -> Loaded:
    """Load a bundle into the engine `name`, or "auto": the fastest that can run it here.

    Raises:
        BundleError: the bundle has nothing for the engine, or is broken.
        EngineError: the engine cannot run here. With "auto": no engine for GPUs can, and the bundle was made for one.
    """
    if name == "auto":
        return _plans_or_cuda(bundle, threads) if has_plans(bundle) else _cuda_or_cpu(bundle, threads)
    try:
        return _LOADERS[name](bundle, threads)
    except EngineError as error:
        if name != "tensorrt":
            raise
        raise _no_plans(bundle, str(error)) from None


def _plans_or_cuda(bundle: Bundle, threads: int | None) -> Loaded:
    """Not the CPU, unasked: graphs that were made for a GPU are the slow choice there."""
    try:
        return _tensorrt(bundle, threads)._replace(notice="captioning with TensorRT")
    except EngineError as error:
        reason = str(error)
    if _has_cuda():
        try:
            loaded = _onnxruntime_cuda(bundle, threads)
        except EngineError as error:
            reason += f", nor can ONNX Runtime use a GPU: {error}"
        else:
            return loaded._replace(
                notice=f"captioning with ONNX Runtime on CUDA, as TensorRT cannot run here: {reason}"
            )
    raise _no_plans(bundle, reason)


def _no_plans(bundle: Bundle, reason: str) -> EngineError:
    """Why plans do not run here, and what would."""
    return EngineError(
        f"{bundle.folder}: its TensorRT plans cannot run here: {reason}; --engine onnxruntime runs its ONNX graphs on "
        f"the CPU, where one exported with --target onnx --precision int8 is faster"
    )


def _cuda_or_cpu(bundle: Bundle, threads: int | None) -> Loaded:
    if not _has_cuda():
        return _onnxruntime(bundle, threads)
    try:
        return _onnxruntime_cuda(bundle, threads)._replace(notice="captioning with ONNX Runtime on CUDA")
    except EngineError as error:
        return _onnxruntime(bundle, threads)._replace(notice=f"captioning on the CPU: {error}")


def _tensorrt(bundle: Bundle, _threads: int | None) -> Loaded:
    from .tensorrt import TensorRTEngine

    engine = TensorRTEngine.load(bundle)
    tokens = bundle.manifest.tokens
    most = min(tokens.max_positions, engine.most_positions)
    return Loaded(engine, "tensorrt", tokens.model_copy(update={"max_positions": most}))


def _has_cuda() -> bool:
    from .onnxruntime_cuda import has_cuda

    return has_cuda()


def _onnxruntime_cuda(bundle: Bundle, threads: int | None) -> Loaded:
    from .onnxruntime_cuda import OnnxRuntimeCudaEngine

    engine = OnnxRuntimeCudaEngine.load(bundle, threads=threads)
    return Loaded(engine, "onnxruntime-cuda", bundle.manifest.tokens)


def _onnxruntime(bundle: Bundle, threads: int | None) -> Loaded:
    from .onnxruntime import OnnxRuntimeEngine

    return Loaded(OnnxRuntimeEngine.load(bundle, threads=threads), "onnxruntime", bundle.manifest.tokens)


_LOADERS: dict[str, Callable[[Bundle, int | None], Loaded]] = {
    "tensorrt": _tensorrt,
    "onnxruntime-cuda": _onnxruntime_cuda,
    "onnxruntime": _onnxruntime,
}
