"""ONNX Runtime on an NVIDIA GPU, with onnxruntime-gpu: visual state and cache stay there between steps."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import onnxruntime as ort

from ..bundle import Bundle
from ..errors import EngineError, reading
from .base import Candidates
from .onnxruntime import OnnxRuntimeEngine

PROVIDER = "CUDAExecutionProvider"


def has_cuda() -> bool:
    """Whether the installed onnxruntime was built for CUDA; whether CUDA works shows when it loads a graph."""
    return PROVIDER in ort.get_available_providers()


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """A bundle's graphs on the first GPU; operators without a CUDA kernel run on the CPU."""

    device = "cuda"

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None) -> Self:
        """Load a bundle's graphs and run them once on a black image, since some fail only when they run.

        Raises:
            BundleError: the bundle lacks a graph, or ONNX Runtime cannot load one on CUDA.
            EngineError: onnxruntime has no CUDA, fell back to the CPU, or cannot run the graphs on CUDA.
        """
        printed, engine = io.StringIO(), None
        if has_cuda():
            if hasattr(ort, "preload_dlls"):
                # CUDA's libraries may be in wheels of their own. It prints what it misses, among the captions.
                with contextlib.redirect_stdout(printed):
                    ort.preload_dlls()
            ort.set_default_logger_severity(4)  # else it prints what it also raises
            try:
                engine = super().load(bundle, threads=threads)
            finally:
                ort.set_default_logger_severity(2)
        if engine is None or any(PROVIDER not in each.get_providers() for each in (engine.vision, engine.decoder)):
            what = (
                f"onnxruntime {ort.__version__} has no CUDA"
                if engine is None
                else "onnxruntime-gpu fell back to the CPU"
            )
            printed_first = printed.getvalue().strip().split("\n")[0]
            raise EngineError(
                f"{what}{f' ({printed_first})' if printed_first else ''}: it needs a GPU with its driver, and "
                "pip install 'onnxruntime-gpu[cuda,cudnn]' in place of onnxruntime"
            )
        state = engine.encode(np.zeros((1, *bundle.manifest.image.output_size, 3), np.uint8))
        for _ in range(2):  # without a past and with one
            engine.step(np.array([[bundle.manifest.tokens.end]]), np.array([0]), state, 1)
        return engine

    def _run(
        self, session: ort.InferenceSession, outputs: Sequence[str], inputs: Mapping[str, ort.OrtValue]
    ) -> dict[str, ort.OrtValue]:
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            # Only the candidates go to the host.
            binding.bind_output(name, "cpu" if name in Candidates._fields else self.device, 0)
        with reading("the graphs cannot run on CUDA", EngineError, "export fp16 or fp32 for a GPU"):
            session.run_with_iobinding(binding)
        return dict(zip(outputs, binding.get_outputs(), strict=True))
