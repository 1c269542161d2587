"""Why a caption says what it says: for each of its tokens, where in the image the adapters looked to write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from tokenizers import Tokenizer

from ..bundle import MANIFEST, Bundle, Manifest
from ..engines.base import Float32
from ..engines.onnxruntime import OnnxRuntimeState
from ..errors import BundleError, ItuneError
from ..image import preprocess, seen_box
from ..settings import Size
from .reader import AttentionReader, Layer

__all__ = ["Explainer", "Explanation", "Layer"]


@dataclass(frozen=True, eq=False)
class Explanation:
    """A caption, and the attention over the image from which each of its tokens was written."""

    caption: str
    token_ids: tuple[int, ...]
    """Without the begin, prompt and end tokens."""
    tokens: tuple[str, ...]
    """The text of each; a letter may be spread over several, and shows as replacement characters then."""
    attention: Float32
    """[tokens, N], mean over the heads, and over the layers with layer "mean": a token's row is the attention at the
    position that predicts it, over all N visual tokens, and sums to 1."""
    grid: Size
    """(rows, columns) of the image's patches: the last rows * columns of the N visual tokens, row by row."""
    layer: Layer
    layers: tuple[int, ...]
    """The decoder layers that `layer` stands for."""
    heads: int
    photo: Image.Image
    """RGB, as it was given (upright)."""
    box: tuple[float, float, float, float]
    """What of the photo the tower saw, and the grid covers: left, top, right, bottom in pixels."""

    @property
    def patches(self) -> Float32:
        """[tokens, rows, columns]: each token's attention to the patches; sums to 1 with `cls_share`."""
        rows, columns = self.grid
        return self.attention[:, self.attention.shape[1] - rows * columns :].reshape(-1, rows, columns)

    @property
    def cls_share(self) -> Float32:
        """[tokens]: each token's attention to what is no place in the image: the CLS token, and registers."""
        share: Float32 = self.attention[:, : self.attention.shape[1] - self.grid[0] * self.grid[1]].sum(axis=1)
        return share

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON; by token: "id", "text", "cls" (share) and "attention" [rows][columns]."""
        return {
            "caption": self.caption,
            "layer": self.layer,
            "grid": list(self.grid),
            "box": [round(edge, 2) for edge in self.box],
            "tokens": [
                {"id": token, "text": text, "cls": _plain(cls), "attention": [[_plain(v) for v in row] for row in rows]}
                for token, text, cls, rows in zip(
                    self.token_ids, self.tokens, self.cls_share, self.patches, strict=True
                )
            ],
        }


def _plain(value: Any) -> float:
    return float(f"{value:.6g}")


class Explainer:
    """Reads attention out of one bundle."""

    def __init__(self, reader: AttentionReader, tokenizer: Tokenizer, manifest: Manifest, grid: Size) -> None:
        self.reader, self.tokenizer, self.manifest, self.grid = reader, tokenizer, manifest, grid
        self.prompt = manifest.tokens.head

    @classmethod
    def load(cls, bundle: Bundle, tokenizer: Tokenizer, threads: int | None = None) -> Explainer:
        """Load a bundle's graphs for it.

        Raises:
            BundleError: the bundle does not tell where its visual tokens lie, or see `AttentionReader.load`.
        """
        grid = bundle.manifest.patch_grid
        reader = AttentionReader.load(bundle, threads=threads)
        if grid is None:
            raise BundleError(
                f"{bundle.folder / MANIFEST}: patches: not given, and {bundle.manifest.decoder.visual_tokens} visual "
                f"tokens are no square: export the bundle again with --patch-grid ROWSxCOLUMNS"
            )
        return cls(reader, tokenizer, bundle.manifest, grid)

    def encode(self, caption: str) -> list[int]:
        """Token ids of a caption, written as the model's training captions were."""
        text = self.manifest.text
        try:
            caption.encode()
        except UnicodeEncodeError:
            raise ItuneError("the caption holds half of a surrogate pair, which is no character") from None
        cleaned = " ".join(caption.split())
        if text.strip_period:
            cleaned = cleaned.rstrip(" .")
        if text.lower:
            cleaned = cleaned.lower()
        if text.prompt and not text.prompt[-1].isspace():
            cleaned = f" {cleaned}"
        ids: list[int] = self.tokenizer.encode(cleaned, add_special_tokens=False).ids
        return ids

    def explain(
        self,
        photo: Image.Image,
        tokens: Sequence[int],
        layer: Layer = "last",
        prompt: Callable[[OnnxRuntimeState], Sequence[int]] | None = None,
    ) -> Explanation:
        """What is looked at in an RGB photo for each of `tokens`, in one step of the decoder.

        `prompt` gives what stands before the caption, for a captioner that retrieves; None: it is the same for all.
        """
        layers, most = self.reader.choose(layer), self.manifest.tokens.max_positions
        state = self.reader.encode(preprocess(photo, self.manifest.image)[None])
        head = self.prompt if prompt is None else prompt(state)
        # A token is written at the position that reads the one before it; nothing reads the last one.
        read = [*head, *tokens[:-1]]
        if len(read) > most:
            raise ItuneError(
                f"the caption has {len(tokens)} tokens, for {most - len(head) + 1} of which the decoder has "
                f"positions: give a shorter one"
            )
        try:
            attention = self.reader.attention(read, state, layer)[len(head) - 1 :][: len(tokens)]
        except Exception as error:
            if self.manifest.tokens.shortlist is None:
                raise
            # Its embedding is a row that does not exist.
            raise ItuneError(
                "the caption has a word that this model cannot write: it knows "
                f"{self.manifest.tokens.shortlist} tokens only (itune-export --vocabulary)"
            ) from error
        return Explanation(
            caption=self.text(tokens),
            token_ids=tuple(tokens),
            tokens=tuple(self.text([token]) for token in tokens),
            attention=attention,
            grid=self.grid,
            layer=layer,
            layers=tuple(layers),
            heads=self.reader.heads,
            photo=photo,
            box=seen_box(photo.size, self.manifest.image),
        )

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say."""
        return " ".join(self.tokenizer.decode(list(tokens), skip_special_tokens=True).split())
