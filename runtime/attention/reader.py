"""What the adapters look at: their attention over the image, read out of a bundle's own decoder graph.

No second graph is exported. In protobuf's wire format an embedded message that occurs twice is the merger of both
(https://protobuf.dev/programming-guides/encoding/#last-one-wins), so a graph gains outputs by a few bytes after the
end of its file: in memory, without the `onnx` library, for every bundle and precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np

from ..bundle import Bundle
from ..engines.base import Float32
from ..engines.onnxruntime import NAME, OnnxRuntimeEngine, OnnxRuntimeState, available_cpus, open_session
from ..errors import BundleError, ItuneError

Layer = str | int
"""An adapted decoder layer, "last" of them, or their "mean"."""
_SOFTMAX = {"i-tuning": "h.{}/mlp/adapter/Softmax", "smallcap": "h.{}/cross_attn/Softmax"}
"""By method: the decoder's value that is a layer's attention S over the image [images, heads, rows / images * T, N]
(without the axis of the heads where I-Tuning has one head)."""
_MODEL_GRAPH, _GRAPH_OUTPUT, _VALUE_NAME = 7, 12, 1  # field numbers in onnx.proto


class AttentionReader(OnnxRuntimeEngine):
    """A bundle's graphs on the CPU, with the adapters' attention among the decoder's outputs."""

    heads: int
    layers: dict[int, str]
    """The output of every adapted layer."""

    @classmethod
    def load(cls, bundle: Bundle, *, threads: int | None = None) -> Self:
        """Load a bundle's ONNX graphs; `threads` None is one for each CPU this process may use.

        Raises:
            BundleError: the bundle has no ONNX graphs (TensorRT plans alone), or is of a method without adapters.
        """
        manifest, folder = bundle.manifest, bundle.folder
        softmax, adapted = _SOFTMAX.get(manifest.method), manifest.decoder.adapter_layers
        if softmax is None or not adapted:
            raise BundleError(
                f"{folder}: method {manifest.method} has no adapters whose attention could be shown; heatmaps are for "
                f"{', '.join(_SOFTMAX)}"
            )
        try:
            vision, decoder = (bundle.graph(role, NAME) for role in ("vision", "decoder"))
        except BundleError as error:
            raise BundleError(f"{error}; attention is read from ONNX graphs, which itune-export writes") from None
        count = threads or available_cpus()
        layers = {layer: softmax.format(layer) for layer in adapted}
        path = bundle.path(decoder.file)
        try:
            graph = path.read_bytes() + more_outputs(layers.values())
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error
        try:
            attentive = open_session(path, count, graph=graph)
        except BundleError as error:
            raise BundleError(
                f"{error} (heatmaps read the adapters' attention from its {next(iter(layers.values()))}); export the "
                f"bundle again"
            ) from None
        reader = cls(open_session(bundle.path(vision.file), count), attentive, manifest.tokens.candidates)
        reader.heads, reader.layers = manifest.decoder.adapter_heads or 1, layers
        return reader

    def attention(self, tokens: Sequence[int], state: OnnxRuntimeState, layer: Layer = "last") -> Float32:
        """Attention float32 [T, N], the mean over heads, at each of `tokens`; every row sums to 1.

        `state`, of one image and nothing decoded yet, holds the tokens afterwards.

        Raises:
            ItuneError: no adapter is on `layer`.
        """
        chosen = self.choose(layer)
        named = self.forward(np.array([tokens]), np.array([0]), state, 1)
        weights = np.stack([named[self.layers[i]].numpy() for i in chosen])
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
            there = ", ".join(map(str, self.layers))
            raise ItuneError(f"layer {layer} carries no adapter: choose last, mean or one of {there}")
        return [number]


def more_outputs(names: Iterable[str]) -> bytes:
    """What makes values of a graph its outputs, too, when it follows a serialized ONNX ModelProto."""
    outputs = (_field(_GRAPH_OUTPUT, _field(_VALUE_NAME, name.encode())) for name in names)
    return _field(_MODEL_GRAPH, b"".join(outputs))


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of wire type 2: its tag, its length, its content."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
