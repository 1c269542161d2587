"""ONNX Runtime on the CPU: a session for the vision graph, a session for the decoder's step.

The key/value cache stays in ONNX Runtime's own memory: what a step returns is fed back to the next. The same on a GPU
is in `onnxruntime_cuda`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from ..bundle import Bundle
from ..errors import BundleError, EngineError
from .base import EMBEDDING, Bool, Candidates, Float32, Int64, UInt8

NAME = "onnxruntime"
CPUINFO = Path("/proc/cpuinfo")
_PAST, _PRESENT = "past_key_values.", "present."
_STEP = {"tokens", "positions", "mask", "parents", "k"}
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntimeState:
    """Visual keys/values of some images, the rows' cache, and the rows' mask of real tokens."""

    def __init__(self, visual: dict[str, ort.OrtValue], device: str = "cpu") -> None:
        """`device`: where the visual state is, as ONNX Runtime calls it."""
        embedding = visual.pop(EMBEDDING, None)
        self.embedding: Float32 | None = None if embedding is None else embedding.numpy()
        self.visual, self.device = visual, device
        self.rows = 0  # of the last step; the cache may hold a copy of the only one behind it
        self.past: dict[str, ort.OrtValue] = {}
        self.mask: Bool | None = None  # [rows, cached tokens]

    @property
    def images(self) -> int:
        """How many images are still in the state."""
        return int(next(iter(self.visual.values())).shape()[0])

    def keep(self, images: Int64) -> None:
        """Drop every image but these (see `State.keep`); on a GPU by way of the host, once for a finished image."""
        self.visual = {name: _value(value.numpy()[images], self.device) for name, value in self.visual.items()}


class OnnxRuntimeEngine:
    """A bundle's graphs behind the engine protocol."""

    device = "cpu"

    def __init__(
        self, vision: ort.InferenceSession, decoder: ort.InferenceSession, most_candidates: int, least_rows: int = 1
    ) -> None:
        """`least_rows`: 1 or 2; with 2, a single row runs beside a copy of itself."""
        self.vision, self.decoder = vision, decoder
        self.most_candidates, self.least_rows = most_candidates, least_rows
        self._pixels = vision.get_inputs()[0].name
        self._visual = [output.name for output in vision.get_outputs()]
        self._outputs = [output.name for output in decoder.get_outputs()]
        self._caches = {
            cache.name: (cache.shape[1], cache.shape[3], _DTYPES[cache.type])  # heads, head_dim
            for cache in decoder.get_inputs()
            if cache.name.startswith(_PAST)
        }

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None) -> Self:
        """Load a bundle's vision and decoder graphs; `threads` None is one for each CPU this process may use.

        Raises:
            BundleError: the bundle lacks a graph, or ONNX Runtime cannot load one.
        """
        count = threads or available_cpus()
        graphs = [bundle.graph(role, NAME) for role in ("vision", "decoder")]
        vision, decoder = (open_session(bundle.path(graph.file), count, device=cls.device) for graph in graphs)
        if odd := _odd(vision, decoder, bundle.manifest.image.output_size):
            raise BundleError(f"{bundle.folder}: {odd}; export the bundle again")
        # On AVX2, 4-bit products of a single row are summed in another order than those of several, and rounding to
        # int8 in the layers above would make that a difference between an image alone and in a batch.
        least_rows = 2 if graphs[1].precision == "int4" else 1
        return cls(vision, decoder, bundle.manifest.tokens.candidates, least_rows)

    def encode(self, pixels: UInt8) -> OnnxRuntimeState:
        """Images, uint8 [B, H, W, 3], to their keys/values."""
        return OnnxRuntimeState(self._run(self.vision, self._visual, {self._pixels: _value(pixels)}), self.device)

    def step(
        self, tokens: Int64, parents: Int64, state: OnnxRuntimeState, k: int, *, mask: Bool | None = None
    ) -> Candidates:
        """One step of the decoder (see `Engine.step`)."""
        named = self.forward(tokens, parents, state, k, mask=mask)
        return Candidates(*(named[name].numpy()[: state.rows] for name in Candidates._fields))

    def forward(
        self, tokens: Int64, parents: Int64, state: OnnxRuntimeState, k: int, *, mask: Bool | None = None
    ) -> dict[str, ort.OrtValue]:
        """The same step, but all outputs of the decoder graph by their names."""
        state.rows = len(tokens)
        real = np.ones(tokens.shape, np.bool_) if mask is None else mask
        if tokens.size < self.least_rows:
            tokens, real, parents = np.repeat(tokens, 2, axis=0), np.repeat(real, 2, axis=0), np.repeat(parents, 2)
        if state.mask is None:
            state.past = {
                name: _value(np.zeros((len(tokens), heads, 0, head_dim), dtype))
                for name, (heads, head_dim, dtype) in self._caches.items()
            }
        else:
            real = np.concatenate([state.mask[parents], real], axis=1)
        inputs = {
            "tokens": tokens,
            "positions": np.maximum(real.cumsum(axis=1) - 1, 0)[:, -tokens.shape[1] :],
            "mask": real,
            "parents": parents,
            "k": np.array([min(k, self.most_candidates)]),
        }
        values = {name: _value(array) for name, array in inputs.items()}
        named = self._run(self.decoder, self._outputs, values | state.past | state.visual)
        state.mask = real
        state.past = {name: named[name.replace(_PAST, _PRESENT)] for name in self._caches}
        return named

    def _run(
        self, session: ort.InferenceSession, outputs: Sequence[str], inputs: Mapping[str, ort.OrtValue]
    ) -> dict[str, ort.OrtValue]:
        """The outputs of a session by their names."""
        try:
            values = session.run_with_ort_values(outputs, inputs)
        except Exception as error:  # ONNX Runtime's errors share no base class
            reason = str(error).strip().split("\n")[0][:300]
            raise EngineError(f"ONNX Runtime cannot run the bundle: {reason}") from None
        return dict(zip(outputs, values, strict=True))


def _odd(vision: ort.InferenceSession, decoder: ort.InferenceSession, size: tuple[int, int]) -> str | None:
    """Why they are no vision and decoder graph that fit each other and pixels of `size`; None if they are."""
    shapes = [each.shape for each in vision.get_inputs()]
    fits = [
        len(shape) == 4 and all(isinstance(n, str) or n == m for n, m in zip(shape[1:3], size, strict=True))
        for shape in shapes
    ]
    if fits != [True]:
        return f"its vision graph takes {shapes}, not pixels of {size[0]} x {size[1]}"
    visual = {each.name for each in vision.get_outputs()} - {EMBEDDING}
    given, made = ({each.name for each in side} for side in (decoder.get_inputs(), decoder.get_outputs()))
    caches = {name for name in given if name.startswith(_PAST)}
    needed = _STEP | visual | caches
    if given != needed:
        return f"its decoder graph takes {_first(given - needed) or 'no ' + _first(needed - given)}"
    promised = {*Candidates._fields, *(name.replace(_PAST, _PRESENT) for name in caches)}
    return f"its decoder graph gives no {_first(promised - made)}" if promised - made else None


def _first(names: Collection[str]) -> str:
    return min(names, default="")


def open_session(
    path: Path, threads: int, *, vnni: bool | None = None, device: str = "cpu", graph: bytes | None = None
) -> ort.InferenceSession:
    """A session over a graph file; raises BundleError if ONNX Runtime cannot load it.

    `graph` takes the place of what is in the file, beside which its external weights are. `vnni` None is found out: see
    `has_vnni`. `device` "cuda" keeps the CPU for what has no CUDA kernel, and falls back
    to it silently where CUDA does not work.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors: they come back as exceptions, warnings tell the user nothing
    # Waiting threads spin within a run, which is a third faster than sleeping, but not after it: there they would
    # take the CPUs from the other session's threads.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # int8 convolution weights become fp32 once, at load, instead of at every run.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not (has_vnni() if vnni is None else vnni):
        options.add_session_config_entry("session.x64quantprecision", "1")  # uint8 by uint8: slower, and exact
    if graph is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    providers = [*(["CUDAExecutionProvider"] if device == "cuda" else []), "CPUExecutionProvider"]
    try:
        return ort.InferenceSession(path if graph is None else graph, options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors share no base class
        reason = str(error).strip().split("\n")[0]
        raise BundleError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {reason}") from None


def has_vnni() -> bool:
    """Whether products of uint8 and int8 are exact here: on x86 without VNNI, ONNX Runtime's saturate.

    Only Linux tells; elsewhere an x86 CPU is taken to be without.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        with CPUINFO.open(encoding="utf-8") as lines:
            flags = next((line.split() for line in lines if line.startswith("flags")), [])
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


def available_cpus() -> int:
    """The CPUs this process may run on, containers' affinity included."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _value(array: Any, device: str = "cpu") -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
