"""ONNX Runtime, on the CPU or on an NVIDIA GPU: a session for the vision graph, a session for the decoder's step.

Visual state and cache stay in ONNX Runtime's own memory, on the device: what a step returns is fed to the next one.
"""

from __future__ import annotations

import contextlib
import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from ..bundle import Bundle
from ..cpus import available_cpus
from ..errors import BundleError, EngineError, reading
from ..graph_names import EMBEDDING, MASK, PARENTS, PAST, POSITIONS, PRESENT, STEP, TOKENS, K
from .base import Bool, Candidates, Float32, Int64, UInt8, mask_and_positions

NAME = "onnxruntime"
CUDA = "CUDAExecutionProvider"
CPUINFO = Path("/proc/cpuinfo")
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_TYPES = {
    **dict.fromkeys((TOKENS, POSITIONS, "token_ids"), ("tensor(int64)", 2)),
    **dict.fromkeys((PARENTS, K), ("tensor(int64)", 1)),
    MASK: ("tensor(bool)", 2),
    "logits": ("tensor(float)", 2),
    "logsumexp": ("tensor(float)", 1),
    EMBEDDING: ("tensor(float)", 2),
}
"""Element type and rank of the graphs' inputs and outputs; caches have rank 4 and any type of `_DTYPES`."""


class OnnxRuntimeState:
    """Visual keys/values of some images, the rows' cache, and the rows' mask of real tokens."""

    def __init__(self, visual: dict[str, ort.OrtValue], device: str = "cpu") -> None:
        """`device`: where the visual state is, named as in ONNX Runtime."""
        embedding = visual.pop(EMBEDDING, None)
        self.embedding: Float32 | None = None if embedding is None else embedding.numpy()
        self.visual, self.device = visual, device
        self.rows = 0  # of the last step; with `least_rows` 2 the cache may also hold a copy of its only row
        self.past: dict[str, ort.OrtValue] = {}
        self.mask: Bool | None = None  # [rows, cached tokens]

    @property
    def images(self) -> int:
        """How many images are still in the state."""
        return int(next(iter(self.visual.values())).shape()[0])

    def keep(self, images: Int64) -> None:
        """Drop every image but `images`; on a GPU this copies through the host, once for each finished image."""
        self.visual = {name: _value(value.numpy()[images], self.device) for name, value in self.visual.items()}


class OnnxRuntimeEngine:
    """A bundle's graphs behind the engine protocol."""

    device = "cpu"

    def __init__(
        self,
        vision: ort.InferenceSession,
        decoder: ort.InferenceSession,
        most_candidates: int,
        least_rows: int = 1,
        vocab_size: int = 2**31,
    ) -> None:
        """`least_rows`: 1 or 2; with 2, a single row runs beside a copy of itself.

        `vocab_size`: a graph that returns a token id from here on is refused.
        """
        self.vision, self.decoder, self.vocab_size = vision, decoder, vocab_size
        self.most_candidates, self.least_rows = most_candidates, least_rows
        self._pixels = vision.get_inputs()[0].name
        self._visual = [output.name for output in vision.get_outputs()]
        self._outputs = [output.name for output in decoder.get_outputs()]
        self._caches = {
            cache.name: (cache.shape[1], cache.shape[3], _DTYPES[cache.type])  # heads, head_dim
            for cache in decoder.get_inputs()
            if cache.name.startswith(PAST)
        }

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None) -> Self:
        """Load a bundle's vision and decoder graphs; `threads` None is one for each CPU this process may use.

        Raises:
            BundleError: the bundle lacks a graph, or its graphs cannot be loaded or do not fit each other.
        """
        count = threads or available_cpus()
        graphs = [bundle.graph(role, NAME) for role in ("vision", "decoder")]
        vision, decoder = (open_session(bundle.path(graph.file), count, device=cls.device) for graph in graphs)
        with reading(bundle.folder, BundleError, "export the bundle again"):  # names may not be UTF-8
            if mismatch := _mismatch(vision, decoder, bundle.manifest.image.output_size):
                raise ValueError(mismatch)
        # On AVX2, 4-bit products of a single row are summed in another order than those of several. Rounding to int8
        # in the layers above would turn that into a difference between an image alone and in a batch.
        least_rows = 2 if graphs[1].precision == "int4" else 1
        limits = bundle.manifest.tokens
        return cls(vision, decoder, limits.candidates, least_rows, limits.vocab_size)

    def encode(self, pixels: UInt8) -> OnnxRuntimeState:
        """Encode images, uint8 [B, H, W, 3]."""
        visual = self._run(self.vision, self._visual, {self._pixels: _value(pixels)})
        if found := {name: value.shape() for name, value in visual.items() if value.shape()[:1] != [len(pixels)]}:
            raise EngineError(f"the vision graph returned {found} for {len(pixels)} images; export the bundle again")
        return OnnxRuntimeState(visual, self.device)

    def step(
        self, tokens: Int64, parents: Int64, state: OnnxRuntimeState, k: int, *, mask: Bool | None = None
    ) -> Candidates:
        """Feed `tokens` [rows, T] to the decoder and return the k best continuations of each row."""
        named = self.forward(tokens, parents, state, k, mask=mask)
        found = Candidates(*(named[name].numpy()[: state.rows] for name in Candidates._fields))
        shape, ids = (len(tokens), min(k, self.most_candidates)), found.token_ids
        shapes = [each.shape for each in found]
        # ONNX Runtime does not insist on the shapes that a graph declares.
        if shapes != [shape, shape, shape[:1]] or (ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size):
            raise EngineError(
                f"the decoder graph returned {shapes} with token ids up to {ids.max(initial=0)}, not {shape} and ids "
                f"from 0 to {self.vocab_size - 1}; export the bundle again"
            )
        return found

    def forward(
        self, tokens: Int64, parents: Int64, state: OnnxRuntimeState, k: int, *, mask: Bool | None = None
    ) -> dict[str, ort.OrtValue]:
        """Run a step and return all outputs of the decoder graph by name."""
        state.rows = len(tokens)
        if tokens.size < self.least_rows:
            tokens, parents, mask = np.repeat(tokens, 2, axis=0), np.repeat(parents, 2), None
        real, positions = mask_and_positions(state.mask, tokens, parents, mask)
        if state.mask is None:
            state.past = {
                name: _value(np.zeros((len(tokens), heads, 0, head_dim), dtype))
                for name, (heads, head_dim, dtype) in self._caches.items()
            }
        inputs = tokens, positions, real, parents, np.array([min(k, self.most_candidates)])
        values = {name: _value(array) for name, array in zip(STEP, inputs, strict=True)}
        named = self._run(self.decoder, self._outputs, values | state.past | state.visual)
        state.mask = real
        state.past = {name: named[name.replace(PAST, PRESENT)] for name in self._caches}
        return named

    def _run(
        self, session: ort.InferenceSession, outputs: Sequence[str], inputs: Mapping[str, ort.OrtValue]
    ) -> dict[str, ort.OrtValue]:
        """The outputs of a session by name."""
        with reading("ONNX Runtime cannot run the bundle", EngineError):
            return dict(zip(outputs, session.run_with_ort_values(outputs, inputs), strict=True))


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """A bundle's graphs on the first GPU, with onnxruntime-gpu; operators without a CUDA kernel run on the CPU."""

    device = "cuda"

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None) -> Self:
        """Load a bundle's graphs and run them once on a black image, since some fail only when they run.

        Raises:
            BundleError: the bundle lacks a graph, or ONNX Runtime cannot load one on CUDA.
            EngineError: onnxruntime has no CUDA, fell back to the CPU, or cannot run the graphs on CUDA.
        """
        problem, printed = f"onnxruntime {ort.__version__} has no CUDA", io.StringIO()
        if has_cuda():
            with contextlib.redirect_stdout(printed):  # it prints the libraries that it misses
                ort.preload_dlls()  # CUDA's libraries may be in wheels of their own
            ort.set_default_logger_severity(4)  # else it prints what it also raises
            try:
                engine = super().load(bundle, threads=threads)
            finally:
                ort.set_default_logger_severity(2)
            if all(CUDA in session.get_providers() for session in (engine.vision, engine.decoder)):
                state = engine.encode(np.zeros((1, *bundle.manifest.image.output_size, 3), np.uint8))
                for _ in range(2):  # without a past and with one
                    engine.step(np.array([[bundle.manifest.tokens.end]]), np.array([0]), state, 1)
                return engine
            missing = printed.getvalue().strip().split("\n")[0]
            problem = "onnxruntime-gpu fell back to the CPU" + (f" ({missing})" if missing else "")
        raise EngineError(
            f"{problem}: it needs a GPU with its driver, and pip install 'onnxruntime-gpu[cuda,cudnn]' in place of "
            "onnxruntime"
        )

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


def _mismatch(vision: ort.InferenceSession, decoder: ort.InferenceSession, size: tuple[int, int]) -> str | None:
    """Why the vision graph does not fit pixels of `size`, or the decoder graph the vision graph; None if they fit."""
    shapes = [each.shape for each in vision.get_inputs()]
    if [len(shape) for shape in shapes] != [4] or any(
        isinstance(n, int) and n != m for n, m in zip(shapes[0][1:3], size, strict=True)
    ):
        return f"its vision graph takes {shapes}, not pixels of {size[0]} x {size[1]}"
    visual = {each.name for each in vision.get_outputs()} - {EMBEDDING}
    inputs, outputs = ({each.name for each in side} for side in (decoder.get_inputs(), decoder.get_outputs()))
    caches = {name for name in inputs if name.startswith(PAST)}
    needed = {*STEP} | visual | caches
    if inputs != needed or not visual:
        return f"its decoder graph takes {sorted(inputs - needed)} and lacks the inputs {sorted(needed - inputs)}"
    if missing := {*Candidates._fields, *(name.replace(PAST, PRESENT) for name in caches)} - outputs:
        return f"its decoder graph lacks the outputs {sorted(missing)}"
    return _wrong_tensor(vision, decoder)


def _wrong_tensor(vision: ort.InferenceSession, decoder: ort.InferenceSession) -> str | None:
    """The first input or output with another type or shape than the engine needs; None if all are right."""
    pixels, given = vision.get_inputs()[0], {each.name: each for each in vision.get_outputs()}
    if pixels.type != "tensor(uint8)":
        return f"{pixels.name} of its vision graph is a {pixels.type}, not tensor(uint8)"
    for each in (*given.values(), *decoder.get_inputs(), *decoder.get_outputs()):
        is_cache = each.name.startswith((PAST, PRESENT))
        kind, rank = _TYPES.get(each.name, (each.type, 4 if is_cache else len(each.shape)))
        if each.name in given:
            kind = _TYPES.get(each.name, (given[each.name].type, 0))[0]
        wrong = each.type != kind or len(each.shape) != rank or (is_cache and each.type not in _DTYPES)
        if each.name.startswith(PAST):
            heads_and_width = each.shape[1::2]
            wrong = wrong or not all(isinstance(n, int) and 0 < n < 2**20 for n in heads_and_width)
        if wrong:
            return f"{each.name} is a {each.type} of shape {each.shape}, not a {kind} with {rank} dimensions"
    return None


def session_options(threads: int) -> ort.SessionOptions:
    """The options of every session."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors come back as exceptions; at 3 they would also go to stderr
    # Waiting threads spin within a run, which is a third faster than sleeping, but not after it: there they would
    # take the CPUs from the threads of other sessions and of PyTorch.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # int8 convolution weights become fp32 once, at load, instead of at every run.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")  # uint8 by uint8: slower, and exact
    return options


def open_session(path: Path, threads: int, *, device: str = "cpu", graph: bytes | None = None) -> ort.InferenceSession:
    """Open a session over a graph file; raises BundleError if ONNX Runtime cannot load it.

    `graph` replaces the content of the file, but not its external weights. `device` "cuda" leaves what has no CUDA
    kernel to the CPU, and silently falls back to the CPU where CUDA does not work.
    """
    options = session_options(threads)
    if graph is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    providers = [*([CUDA] if device == "cuda" else []), "CPUExecutionProvider"]
    with reading(path, BundleError, f"ONNX Runtime {ort.__version__} cannot load it"):
        # The fallback of a session on the CPU prints the error on stdout and tries the same again.
        fallback = {"enable_fallback": int(device == "cuda")}
        return ort.InferenceSession(path if graph is None else graph, options, providers=providers, **fallback)


def has_cuda() -> bool:
    """Whether the installed onnxruntime was built for CUDA; whether CUDA works shows when it loads a graph."""
    return CUDA in ort.get_available_providers()


def has_vnni() -> bool:
    """Whether products of uint8 and int8 are exact here: on x86 without VNNI, ONNX Runtime's saturate.

    Only Linux reports it; on other systems an x86 CPU counts as one without VNNI.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        with CPUINFO.open(encoding="utf-8") as lines:
            flags = next((line.split() for line in lines if line.startswith("flags")), [])
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


def _value(array: Any, device: str = "cpu") -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
