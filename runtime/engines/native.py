"""The decoder and CLIP's vision transformer in C++, made for the processor that they run on.

They read the weights of the bundle's graphs, so that both engines compute with the same numbers, and pack them into the
layout of their kernels (runtime/native/kernels/kernels.h). Other vision towers stay on ONNX Runtime.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..bundle import BUNDLE_FOLDER, MANIFEST, Bundle, LanguageModelSettings, Manifest, TensorSpec
from ..cpus import available_cpus
from ..errors import BundleError, EngineError, ItuneError, SearchError, reading
from ..graph_names import EMBEDDING, VISUAL, keys, past, values
from ..onnx_files import StoredTensor, find_weights
from ..search.config import SearchConfig
from ..settings import ACTIVATIONS
from .base import NOT_NUMBERS, Bool, Candidates, Float32, Int64, UInt8
from .onnxruntime import NAME as ONNXRUNTIME
from .onnxruntime import open_session

try:
    import _itune_native
except ImportError:  # built without a compiler
    KERNELS: tuple[str, ...] = ()
else:
    KERNELS = tuple(_itune_native.kernels())
"""The kernels that this processor can run, the fastest first; none if the extension was not built."""

NAME = "native"
CHOICE = "ITUNE_KERNELS"
"""Environment variable that names other kernels than the fastest."""
MEND = "export the bundle again, or use --engine onnxruntime"
PREFIX = f"{VISUAL}prefix"
_HALF = ".fp16"


@dataclass(frozen=True)
class DecoderShape:
    """What the C++ decoder is made of; `make_decoder` in module.cpp reads the fields by name."""

    heads: int
    width: int
    inner: int
    vocabulary: int
    positions: int
    prefix: int
    visual_width: int
    epsilon: float
    activation: str
    layers: int
    attention_scale: float
    inverse_layer_scale: bool
    """Divide the scale on Q K^T by the number of the layer, from 1 on."""
    adapter_layers: tuple[int, ...]
    cross_attention: bool

    @classmethod
    def of(cls, manifest: Manifest, model: LanguageModelSettings, inputs: Iterable[TensorSpec]) -> DecoderShape:
        """The decoder that a manifest describes, with these inputs of its graph.

        Raises:
            ValueError: the heads of the cache are others.
        """
        own, tokens = manifest.decoder, manifest.tokens
        _check_shapes(inputs, {past(0, "key"): [own.heads, "P", own.head_dim]})
        return cls(
            heads=own.heads,
            width=own.hidden_size,
            inner=model.n_inner or 4 * own.hidden_size,
            vocabulary=tokens.vocab_size,
            positions=tokens.max_positions,
            prefix=tokens.prefix,
            visual_width=own.bottleneck or 0,
            epsilon=model.layer_norm_epsilon,
            activation=ACTIVATIONS[model.activation_function],
            layers=own.layers,
            attention_scale=own.head_dim**-0.5 if model.scale_attn_weights else 1.0,
            inverse_layer_scale=model.scale_attn_by_inverse_layer_idx,
            adapter_layers=tuple(own.adapter_layers),
            cross_attention=manifest.method == "smallcap",
        )


@dataclass(frozen=True)
class EncoderShape:
    """What the C++ encoder is made of; `make_encoder` in module.cpp reads the fields by name."""

    width: int
    heads: int
    inner: int
    layers: int
    image_size: int
    patch_size: int
    epsilon: float
    activation: str
    adapters: int
    visual_heads: int
    visual_width: int

    @classmethod
    def of(cls, manifest: Manifest, outputs: Sequence[TensorSpec]) -> EncoderShape | None:
        """The encoder that a manifest describes; None if the vision graph with these outputs is of another kind.

        Raises:
            ValueError: the heads of the outputs are others.
        """
        own, model = manifest.decoder, manifest.vision_model
        if model is None or own.adapter_heads is None or own.bottleneck is None:
            return None
        if [spec.name for spec in outputs] != [part(i) for i in own.adapter_layers for part in (keys, values)]:
            return None
        width = own.bottleneck // own.adapter_heads
        _check_shapes(outputs, {keys(i): [own.adapter_heads, width, own.visual_tokens] for i in own.adapter_layers})
        return cls(
            width=model.hidden_size,
            heads=model.num_attention_heads,
            inner=model.intermediate_size,
            layers=model.num_hidden_layers,
            image_size=model.image_size,
            patch_size=model.patch_size,
            epsilon=model.layer_norm_eps,
            activation=ACTIVATIONS[model.hidden_act],
            adapters=len(own.adapter_layers),
            visual_heads=own.adapter_heads,
            visual_width=own.bottleneck,
        )


class NativeState:
    """Visual keys/values of some images, and their rows' cache, in C++."""

    def __init__(self, state: Any, embedding: Float32 | None) -> None:
        self.native, self.embedding = state, embedding

    @property
    def images(self) -> int:
        """How many images are still in the state."""
        return int(self.native.images)

    def keep(self, images: Int64) -> None:
        """Drop every image but `images`."""
        self.native.keep(images)


@dataclass(frozen=True)
class ClipEncoder:
    """CLIP's vision transformer in C++."""

    encoder: Any
    decoder: Any

    def __call__(self, pixels: UInt8) -> NativeState:
        """Encode images, uint8 [B, H, W, 3]."""
        with reading("the encoder", EngineError):
            return NativeState(self.encoder.encode(np.ascontiguousarray(pixels), self.decoder), None)


@dataclass(frozen=True)
class GraphEncoder:
    """Any vision graph, on ONNX Runtime."""

    session: ort.InferenceSession
    decoder: Any
    pixels: str
    names: list[str]
    """Of the graph's outputs."""
    visual: list[tuple[str, str]]
    """Keys and values of the adapted layers."""

    @classmethod
    def of(cls, session: ort.InferenceSession, decoder: Any, shape: DecoderShape) -> GraphEncoder:
        """An encoder whose graph gives what a decoder of this shape reads.

        Raises:
            ValueError: outputs are missing.
        """
        names = [output.name for output in session.get_outputs()]
        visual = [(keys(layer), values(layer)) for layer in shape.adapter_layers]
        needed = {name for pair in visual for name in pair} | ({PREFIX} if shape.prefix else set())
        if missing := needed - set(names):
            raise ValueError(f"its outputs lack {min(missing)}")
        return cls(session, decoder, session.get_inputs()[0].name, names, visual)

    def __call__(self, pixels: UInt8) -> NativeState:
        """Encode images, uint8 [B, H, W, 3]."""
        with reading("ONNX Runtime cannot run the bundle", EngineError):
            outputs = self.session.run(self.names, {self.pixels: np.ascontiguousarray(pixels)})
        found: dict[str, NDArray[Any]] = dict(zip(self.names, outputs, strict=True))
        with reading("the vision graph does not fit the decoder", EngineError, "export the bundle again"):
            if wrong := {name: array.shape for name, array in found.items() if len(array) != len(pixels)}:
                raise ValueError(f"outputs {wrong} for {len(pixels)} images")
            state = self.decoder.state(len(pixels), [(found[key], found[value]) for key, value in self.visual])
            if PREFIX in found:
                state.set_prefix(found[PREFIX], self.decoder)
        return NativeState(state, found.get(EMBEDDING))


class NativeEngine:
    """The C++ decoder, and what encodes for it, behind the engine protocol and as one call for a whole search."""

    def __init__(self, encode: Callable[[UInt8], NativeState], decoder: Any) -> None:
        self.encode, self.decoder = encode, decoder
        self.most_candidates: int = decoder.candidates

    @property
    def kernels(self) -> str:
        """The name of the kernels that run, such as "avx512-vnni"."""
        return str(self.decoder.kernels)

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None) -> NativeEngine:
        """Load the weights of a bundle's graphs; `threads` None is one for each CPU this process may use.

        Raises:
            EngineError: this engine was not built, or cannot run the bundle: another engine may.
            BundleError: the bundle lacks a graph, or a graph is damaged.
            ItuneError: ITUNE_KERNELS names none that this processor can run.
        """
        if not KERNELS:
            raise EngineError("the native engine was not built: install itune where there is a C++ compiler")
        wanted = os.environ.get(CHOICE, "")
        if wanted and wanted not in KERNELS:
            raise ItuneError(f"{CHOICE} {wanted!r}: choose one of {', '.join(KERNELS)}")
        count, manifest = threads or available_cpus(), bundle.manifest
        entries = [bundle.graph(role, ONNXRUNTIME) for role in ("vision", "decoder")]
        vision, graph = (bundle.path(entry.file) for entry in entries)
        with reading(bundle.folder / MANIFEST, EngineError, MEND):
            if (model := manifest.language_model) is None:
                raise ValueError("restore and gpt2 are missing")
            shape = DecoderShape.of(manifest, model, entries[1].inputs)
        with reading(graph, BundleError, BUNDLE_FOLDER.mend):
            stored = find_weights(graph)
        with reading(graph, EngineError, MEND):
            decoder = _itune_native.Decoder(shape, _loaders(stored), count, wanted)
        with reading(vision, EngineError, MEND):
            encoder = EncoderShape.of(manifest, entries[0].outputs)
            if encoder is not None:
                weights = _loaders(find_weights(vision))
                return cls(ClipEncoder(_itune_native.Encoder(encoder, weights, count, wanted), decoder), decoder)
        session = open_session(vision, count)
        with reading(vision, EngineError, MEND):
            return cls(GraphEncoder.of(session, decoder, shape), decoder)

    def step(
        self, tokens: Int64, parents: Int64, state: NativeState, k: int, *, mask: Bool | None = None
    ) -> Candidates:
        """Feed `tokens` [rows, T] to the decoder and return the k best continuations of each row."""
        real = np.ones(tokens.shape, np.bool_) if mask is None else mask
        with reading("the decoder", EngineError):
            return Candidates(*self.decoder.step(state.native, tokens, parents, real, k))

    def captions(
        self, state: NativeState, prompts: Int64, config: SearchConfig, end_token: int
    ) -> list[list[tuple[list[int], float]]]:
        """The search as a whole; `prompts` [images, length] as in `search.loop`."""
        with reading("the decoder", EngineError):
            try:
                found: list[list[tuple[list[int], float]]] = self.decoder.captions(
                    state.native, prompts, config, end_token, self.most_candidates
                )
            except _itune_native.NotNumbersError as error:
                raise SearchError(NOT_NUMBERS) from error
        return found

    def attention(self, state: NativeState, tokens: Sequence[int]) -> Float32:
        """The adapters' attention to the only image of `state` [layers, heads, T, N] while `tokens` [T] are read."""
        with reading("the decoder", EngineError):
            weights: Float32 = self.decoder.attention(state.native, np.array(tokens, np.int64))
        return weights


def _check_shapes(specs: Iterable[TensorSpec], expected: Mapping[str, list[Any]]) -> None:
    """Raise ValueError if a tensor has another shape behind its first dimension: weights do not tell their heads."""
    for spec in specs:
        if spec.name in expected and spec.shape[1:] != expected[spec.name]:
            raise ValueError(f"{spec.name} has shape {spec.shape}, but decoder says {expected[spec.name]}")


def _loaders(weights: Mapping[str, StoredTensor]) -> dict[str, Callable[[], NDArray[Any]]]:
    """Functions that read the weights of a graph, under the names that they have in the fp32 graph."""
    return {
        name.removesuffix(_HALF) if stored.dtype == np.float16 else name: stored.load
        for name, stored in weights.items()
    }
