"""ONNX Runtime on an NVIDIA GPU, by onnxruntime-gpu: visual state and cache stay there from one step to the next."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import onnxruntime as ort

from ..bundle import Bundle
from ..errors import BundleError, EngineError
from .base import Candidates
from .onnxruntime import OnnxRuntimeEngine

PROVIDER = "CUDAExecutionProvider"


def has_cuda() -> bool:
    """Whether the onnxruntime that is installed was built for CUDA; whether it works is seen when it loads a graph."""
    return PROVIDER in ort.get_available_providers()


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """A bundle's graphs on the first GPU; what has no CUDA kernel runs on the CPU."""

    device = "cuda"

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None) -> Self:
        """Load a bundle's graphs, and caption nothing with them once, since some fail only when they run.

        Raises:
            BundleError: the bundle lacks a graph.
            EngineError: onnxruntime has no CUDA, fell back to the CPU, or cannot run the graphs on CUDA.
        """
        if not has_cuda():
            raise EngineError(
                f"onnxruntime {ort.__version__} here has no CUDA: install onnxruntime-gpu in place of onnxruntime"
            )
        for role in ("vision", "decoder"):
            bundle.graph(role, "onnxruntime")
        printed = io.StringIO()
        if hasattr(ort, "preload_dlls"):
            # CUDA's libraries may lie in wheels of their own. What it misses it prints among the captions.
            with contextlib.redirect_stdout(printed):
                ort.preload_dlls()
        ort.set_default_logger_severity(4)  # else it tells the terminal what it tells us
        try:
            engine = super().load(bundle, threads=threads)
        except BundleError as error:
            raise EngineError(f"on CUDA: {error}") from None
        finally:
            ort.set_default_logger_severity(2)
        if any(PROVIDER not in session.get_providers() for session in (engine.vision, engine.decoder)):
            reason = printed.getvalue().strip().split("\n")[0]
            raise EngineError(
                f"onnxruntime-gpu fell back to the CPU, as it does without a GPU, its driver or CUDA's libraries"
                f"{f' ({reason})' if reason else ''}: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        try:
            engine._try_out(bundle)
        except Exception as error:  # ONNX Runtime's errors share no base class
            reason = str(error).strip().split("\n")[0]
            raise EngineError(
                f"{bundle.folder}: its graphs cannot run on CUDA ({reason}); export fp16 or fp32 for a GPU"
            ) from None
        return engine

    def _try_out(self, bundle: Bundle) -> None:
        state = self.encode(np.zeros((1, *bundle.manifest.image.output_size, 3), np.uint8))
        tokens = bundle.manifest.tokens
        for _ in range(2):  # without a past and with one
            self.step(np.array([[tokens.end]]), np.array([0]), state, 1)

    def _run(
        self, session: ort.InferenceSession, outputs: Sequence[str], inputs: Mapping[str, ort.OrtValue]
    ) -> dict[str, ort.OrtValue]:
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            # The candidates alone are for the host.
            binding.bind_output(name, "cpu" if name in Candidates._fields else self.device, 0)
        session.run_with_iobinding(binding)
        return dict(zip(outputs, binding.get_outputs(), strict=True))
