"""Why a caption says what it says: for each token, where in the image the adapters looked to write it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from ..bundle import MANIFEST, Bundle, Manifest
from ..cpus import available_cpus
from ..engines.base import Float32, UInt8
from ..engines.onnxruntime import NAME, OnnxRuntimeEngine, OnnxRuntimeState, open_session
from ..errors import BundleError, EngineError, ItuneError, reading
from ..graph_names import visual_attention
from ..image import preprocess, seen_box
from ..settings import Size
from ..text import decode_text

Layer = str | int
"""An adapted decoder layer, "last" (the last of them), or "mean" (of all)."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """A caption, and the attention over the image from which each of its tokens was written."""

    caption: str
    token_ids: tuple[int, ...]
    """Without the begin, prompt and end tokens."""
    tokens: tuple[str, ...]
    """The text of each token; a letter may be split over several, which then show as replacement characters."""
    attention: Float32
    """[tokens, N], mean over the heads, and over the layers with layer "mean": the attention over all N visual tokens
    at the position that predicts the token; each row sums to 1."""
    grid: Size
    """(rows, columns) of the image's patches: the last rows * columns of the N visual tokens, row by row."""
    layer: Layer
    layers: tuple[int, ...]
    """The decoder layers that `layer` stands for."""
    heads: int
    photo: Image.Image
    """The upright RGB photo."""
    box: tuple[float, float, float, float]
    """The part of the photo that the tower saw and the grid covers: left, top, right, bottom in pixels."""

    @property
    def patches(self) -> Float32:
        """[tokens, rows, columns]: attention of each token to the patches; sums to 1 with `cls_share`."""
        rows, columns = self.grid
        return self.attention[:, self.attention.shape[1] - rows * columns :].reshape(-1, rows, columns)

    @property
    def cls_share(self) -> Float32:
        """[tokens]: attention of each token to visual tokens without a position in the image: CLS and registers."""
        share: Float32 = self.attention[:, : self.attention.shape[1] - self.grid[0] * self.grid[1]].sum(axis=1)
        return share

    def _repr_jpeg_(self) -> bytes:
        """The heatmap, for notebooks."""
        from .. import draw_heatmap  # imports this module

        file = io.BytesIO()
        draw_heatmap(self).save(file, "JPEG", quality=92)
        return file.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """The explanation for JSON; for each token: "id", "text", "cls" (share) and "attention" [rows][columns]."""
        tokens = zip(self.token_ids, self.tokens, self.cls_share, self.patches, strict=True)
        return {
            "caption": self.caption,
            "layer": self.layer,
            "grid": list(self.grid),
            "box": [round(edge, 2) for edge in self.box],
            "tokens": [
                {"id": token, "text": text, "cls": _plain(cls), "attention": [[_plain(v) for v in row] for row in rows]}
                for token, text, cls, rows in tokens
            ],
        }


def _plain(value: Any) -> float:
    return float(f"{value:.6g}")


class AttentiveEngine(Protocol):
    """An engine that shows the adapters' attention."""

    def encode(self, pixels: UInt8) -> Any:
        """Encode images, uint8 [B, H, W, 3], into a state."""

    def attention(self, state: Any, tokens: Sequence[int]) -> Float32:
        """Attention to the only image of `state` [adapted layers, heads, T, N] while `tokens` [T] are read.

        Raises:
            EngineError: the decoder cannot read the tokens.
        """


class AttentiveGraphs(OnnxRuntimeEngine):
    """A bundle's ONNX graphs on the CPU, with the adapters' attention among the decoder's outputs."""

    shown: Sequence[str] = ()
    """The names of these outputs, one for each adapted layer."""

    def attention(self, state: OnnxRuntimeState, tokens: Sequence[int]) -> Float32:
        """As in AttentiveEngine."""
        outputs = self.forward(np.array([tokens]), np.array([0]), state, 1)
        weights = [outputs[name].numpy() for name in self.shown]
        return np.stack([each.reshape(-1, len(tokens), each.shape[-1]) for each in weights]).astype(np.float32)


@dataclass(frozen=True)
class Explainer:
    """Explains captions by the attention of a bundle's decoder."""

    engine: AttentiveEngine
    tokenizer: Tokenizer
    manifest: Manifest
    grid: Size

    @classmethod
    def load(
        cls,
        bundle: Bundle | None,
        tokenizer: Tokenizer,
        threads: int | None = None,
        engine: AttentiveEngine | None = None,
    ) -> Explainer:
        """Explain with `engine`, which runs the bundle; None: load its ONNX graphs, with `threads` as in their engine.

        Raises:
            BundleError: no bundle; a method without adapters; no ONNX graphs; an unknown position of the patches.
        """
        if bundle is None:
            raise BundleError("attention is read from a bundle, and this model is a checkpoint: export it first")
        manifest, grid, layers = bundle.manifest, bundle.manifest.patch_grid, bundle.manifest.decoder.adapter_layers
        if not layers or grid is None:
            raise BundleError(
                f"{bundle.folder / MANIFEST}: a heatmap needs a method with adapters (adapter_layers of "
                f"{manifest.method}: {layers}) and patches (found: {manifest.patches}, "
                f"{manifest.decoder.visual_tokens} visual tokens; if they form no square, export the bundle again "
                "with --patch-grid ROWSxCOLUMNS)"
            )
        if engine is None:
            vision, decoder = (bundle.path(bundle.graph(role, NAME).file) for role in ("vision", "decoder"))
            shown = [visual_attention(each, manifest.method) for each in layers]
            with reading(decoder, BundleError):
                attentive = decoder.read_bytes() + more_outputs(shown)
            count = threads or available_cpus()
            sessions = open_session(vision, count), open_session(decoder, count, graph=attentive)
            engine = graphs = AttentiveGraphs(*sessions, manifest.tokens.candidates)
            graphs.shown = shown
        return cls(engine, tokenizer, manifest, grid)

    def choose(self, layer: Layer) -> list[int]:
        """The decoder layers that `layer` stands for.

        Raises:
            ItuneError: there is no adapter on `layer`.
        """
        adapted = self.manifest.decoder.adapter_layers
        if layer == "mean":
            return adapted
        number = max(adapted) if layer == "last" else int(layer) if str(layer).isdecimal() else -1
        if number not in adapted:
            raise ItuneError(f"layer {layer} has no adapter: choose last, mean or one of {str(adapted)[1:-1]}")
        return [number]

    def explain(
        self,
        photo: Image.Image,
        tokens: Sequence[int],
        layer: Layer,
        prompt: Callable[[Any], Sequence[int]],
    ) -> Explanation:
        """Explain `tokens` as a caption of an RGB photo, in one step of the decoder.

        `prompt` returns the prompt tokens of the encoded image.

        Raises:
            ItuneError: there is no adapter on `layer`, or the decoder cannot write the tokens.
        """
        layers, heads = self.choose(layer), self.manifest.decoder.adapter_heads or 1
        state = self.engine.encode(preprocess(photo, self.manifest.image)[None])
        before, limits = prompt(state), self.manifest.tokens
        # The position that reads a token predicts the next one; nothing reads the last one.
        read = [*before, *tokens[:-1]]
        try:
            weights = self.engine.attention(state, read)
        except EngineError as error:  # the graph has no embedding for such a token or position
            raise ItuneError(
                f"the decoder cannot write the {len(tokens)} tokens of the caption: it has positions for "
                f"{limits.max_positions - len(before) + 1}, and {limits.candidates} of the {limits.vocab_size} tokens "
                "in its vocabulary (itune-export --vocabulary)"
            ) from error
        with reading(f"{MANIFEST}: adapter_heads {heads}", BundleError, "export the bundle again"):
            places = [self.manifest.decoder.adapter_layers.index(each) for each in layers]
            by_head = weights[places].reshape(len(layers) * heads, len(read), self.manifest.decoder.visual_tokens)
        return Explanation(
            caption=decode_text(self.tokenizer, tokens),
            token_ids=tuple(tokens),
            tokens=tuple(decode_text(self.tokenizer, [token]) for token in tokens),
            attention=by_head.mean(axis=0)[len(before) - 1 :][: len(tokens)],
            grid=self.grid,
            layer=layer,
            layers=tuple(layers),
            heads=heads,
            photo=photo,
            box=seen_box(photo.size, self.manifest.image),
        )


def more_outputs(names: Iterable[str]) -> bytes:
    """Bytes that, appended to a serialized ONNX ModelProto, make the named values outputs of its graph.

    In protobuf's wire format an embedded message that occurs twice is merged
    (https://protobuf.dev/programming-guides/encoding/#last-one-wins). So a bundle needs no second graph, and this
    needs no `onnx` library.
    """
    graph, output, name = 7, 12, 1  # field numbers in onnx.proto
    return _field(graph, b"".join(_field(output, _field(name, each.encode())) for each in names))


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of wire type 2: its tag, its length as a varint, its content."""
    length, digits = len(content), []
    while length > 0x7F:
        digits.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([number << 3 | 2, *digits, length]) + content
