"""The adapters' attention over the image, read from a bundle's own decoder graph.

No second graph is exported. In protobuf's wire format an embedded message that occurs twice is merged
(https://protobuf.dev/programming-guides/encoding/#last-one-wins), so a few bytes appended to the file give the graph
more outputs: in memory, without the `onnx` library, for every bundle and precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np

from ..bundle import Bundle
from ..engines.base import Float32
from ..engines.onnxruntime import NAME, OnnxRuntimeEngine, OnnxRuntimeState, available_cpus, open_session
from ..errors import BundleError, ItuneError, reading
from ..graph_names import visual_attention

Layer = str | int
"""An adapted decoder layer, "last" (the last of them), or "mean" (of all)."""
_MODEL_GRAPH, _GRAPH_OUTPUT, _VALUE_NAME = 7, 12, 1  # field numbers in onnx.proto


class AttentionReader(OnnxRuntimeEngine):
    """A bundle's graphs on the CPU, with the adapters' attention among the decoder's outputs."""

    heads: int
    layers: dict[int, str]
    """The attention output of each adapted layer."""

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None) -> Self:
        """Load the ONNX graphs of a bundle with adapters; `threads` None: one for each CPU this process may use.

        Raises:
            BundleError: the bundle has no ONNX graphs (TensorRT plans only), or they cannot be loaded.
        """
        manifest, count = bundle.manifest, threads or available_cpus()
        layers = {layer: visual_attention(layer, manifest.method) for layer in manifest.decoder.adapter_layers}
        vision, decoder = (bundle.path(bundle.graph(role, NAME).file) for role in ("vision", "decoder"))
        with reading(decoder, BundleError):
            graph = decoder.read_bytes() + more_outputs(layers.values())
        attentive = open_session(decoder, count, graph=graph)
        reader = cls(open_session(vision, count), attentive, manifest.tokens.candidates)
        reader.heads, reader.layers = manifest.decoder.adapter_heads or 1, layers
        return reader

    def attention(self, tokens: Sequence[int], state: OnnxRuntimeState, layer: Layer = "last") -> Float32:
        """Attention float32 [T, N] at each of `tokens`, the mean over heads; every row sums to 1.

        `state` must be new and of one image; its cache holds the tokens afterwards.

        Raises:
            ItuneError: there is no adapter on `layer`.
        """
        chosen = self.choose(layer)
        outputs = self.forward(np.array([tokens]), np.array([0]), state, 1)
        weights = np.stack([outputs[self.layers[i]].numpy() for i in chosen])
        by_head: Float32 = weights.reshape(len(chosen) * self.heads, len(tokens), -1).astype(np.float32)
        mean: Float32 = by_head.mean(axis=0)
        return mean

    def choose(self, layer: Layer) -> list[int]:
        """The decoder layers that `layer` stands for."""
        if layer == "last":
            return [max(self.layers)]
        if layer == "mean":
            return list(self.layers)
        number = int(layer) if str(layer).isdecimal() else None
        if number not in self.layers:
            adapted = ", ".join(map(str, self.layers))
            raise ItuneError(f"layer {layer} has no adapter: choose last, mean or one of {adapted}")
        return [number]


def more_outputs(names: Iterable[str]) -> bytes:
    """Bytes that, appended to a serialized ONNX ModelProto, make the named values outputs of its graph."""
    outputs = (_field(_GRAPH_OUTPUT, _field(_VALUE_NAME, name.encode())) for name in names)
    return _field(_MODEL_GRAPH, b"".join(outputs))


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of wire type 2: its tag, its length, its content."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
