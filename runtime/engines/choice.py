"""Choose the engine that runs a bundle here."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

from ..bundle import Bundle, TokenSettings
from ..errors import EngineError, ItuneError
from .base import Engine
from .native import NAME as NATIVE
from .native import NativeEngine
from .onnxruntime import NAME, OnnxRuntimeCudaEngine, OnnxRuntimeEngine, has_cuda


class Loaded(NamedTuple):
    """An engine that has loaded a bundle."""

    engine: Engine[Any]
    name: str
    """One of `captioner.ENGINES`, but not "auto"."""
    tokens: TokenSettings
    """The bundle's, with as many positions as this engine has."""
    notice: str | None
    """Which engine "auto" chose, and why; None for the plain case of the CPU."""


def load_engine(bundle: Bundle, name: str, threads: int | None = None) -> Loaded:
    """Load a bundle into the engine `name`, or "auto": the fastest engine that can run it here.

    "auto" never runs a bundle with TensorRT plans on the CPU: ONNX graphs made for a GPU are slow there.

    Raises:
        BundleError: the bundle has no graphs for the engine, or is damaged.
        EngineError: the engine cannot run here; with "auto", the bundle was made for a GPU and no engine can use one.
    """
    if name == NATIVE:
        return Loaded(NativeEngine.load(bundle, threads=threads), NATIVE, bundle.manifest.tokens, None)
    if name not in ("auto", "tensorrt"):
        return _onnxruntime(bundle, threads, name)
    auto, reason, notice = name == "auto", "", None
    plans = not auto or any(graph.engine == "tensorrt" for graph in bundle.manifest.graphs)
    if plans:
        try:
            return _tensorrt(bundle, "captioning with TensorRT" if auto else None)
        except EngineError as error:
            reason = str(error)
    if auto and has_cuda():
        try:
            why = f", as TensorRT cannot run here: {reason}" if plans else ""
            return _onnxruntime(bundle, threads, "onnxruntime-cuda", f"captioning with ONNX Runtime on CUDA{why}")
        except ItuneError as error:
            notice = f"captioning on the CPU: {error}"
            reason += f", nor can ONNX Runtime use a GPU: {error}"
    if plans:
        raise EngineError(
            f"{bundle.folder}: its TensorRT plans cannot run here: {reason}; --engine onnxruntime runs its ONNX graphs "
            "on the CPU, but a bundle exported with --target onnx --precision int8 is faster there"
        )
    with suppress(EngineError):  # not built, or the bundle is of another kind
        return load_engine(bundle, NATIVE, threads)._replace(notice=notice)
    return _onnxruntime(bundle, threads, notice=notice)


def _tensorrt(bundle: Bundle, notice: str | None) -> Loaded:
    from .tensorrt import TensorRTEngine  # slow to import, and most machines have no use for it

    engine, tokens = TensorRTEngine.load(bundle), bundle.manifest.tokens
    most = min(tokens.max_positions, engine.most_positions)
    return Loaded(engine, "tensorrt", tokens.model_copy(update={"max_positions": most}), notice)


def _onnxruntime(bundle: Bundle, threads: int | None, name: str = NAME, notice: str | None = None) -> Loaded:
    engine = OnnxRuntimeEngine if name == NAME else OnnxRuntimeCudaEngine
    return Loaded(engine.load(bundle, threads=threads), name, bundle.manifest.tokens, notice)
