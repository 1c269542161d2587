"""The only interface between a model and the search: every engine has `encode` and `step`.

Rows are grouped by image: row r belongs to image r // (rows / images).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..search.config import SearchConfig

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]


NOT_NUMBERS = (
    "the decoder returned logits that are NaN or infinite: export it again, in fp32 if it was fp16 or quantised"
)


class Candidates(NamedTuple):
    """What a step returns to the search: the k best next tokens of each row, best first.

    `logits` are raw (not log-probabilities), so that greedy and beam search both follow transformers;
    `logits - logsumexp[:, None]` are the log-probabilities. Equal logits stand in order of the token id.
    """

    logits: Float32  # [rows, k]
    token_ids: Int64  # [rows, k]
    logsumexp: Float32  # [rows]


class State(Protocol):
    """Visual keys/values of some images and the key/value cache of their rows."""

    @property
    def images(self) -> int:
        """How many images are still in the state."""

    @property
    def embedding(self) -> Float32 | None:
        """The images' embeddings [images, D] of length 1, to search a datastore with; None if the model has none."""

    def keep(self, images: Int64) -> None:
        """Drop every image but `images` (indices into the present ones, ascending).

        Only the visual state is gathered. The cache is gathered by the `parents` of the next step, which still
        refer to rows of the previous step as it was before this call.
        """


S = TypeVar("S", bound=State)


class Engine(Protocol[S]):
    """A captioning model that the search can drive."""

    @property
    def most_candidates(self) -> int:
        """The number of different tokens that the model can write; a step returns at most this many for each row."""

    def encode(self, pixels: UInt8) -> S:
        """Encode images, uint8 pixels [images, height, width, 3], into a state with an empty cache."""

    def step(self, tokens: Int64, parents: Int64, state: S, k: int, *, mask: Bool | None = None) -> Candidates:
        """Feed `tokens` [rows, T] and return the k best continuations of each row, k <= most_candidates.

        `parents` [rows]: the row of the previous step that each row continues; on the first step arange(images),
        on the second the image's own row. `mask` [rows, T] is False at the left padding of prompts of different
        lengths (first step only); None means that every token is real. Positions follow from the mask.
        """


@runtime_checkable
class SearchingEngine(Protocol):
    """An engine that runs a whole search by itself."""

    def captions(
        self, state: Any, prompts: Int64, config: SearchConfig, end_token: int
    ) -> list[list[tuple[list[int], float]]]:
        """The captions of each image, tokens and score; `prompts` [images, length] are left-padded with NO_TOKEN.

        Raises:
            SearchError: a logit is NaN or infinite.
        """


def mask_and_positions(before: Bool | None, tokens: Int64, parents: Int64, mask: Bool | None) -> tuple[Bool, Int64]:
    """The mask of real tokens [rows, cached and new tokens] after a step, and the positions of `tokens` [rows, T].

    `before` is the mask after the previous step, None on the first; the others are the arguments of `Engine.step`.
    """
    real = np.ones(tokens.shape, np.bool_) if mask is None else mask
    if before is not None:
        real = np.concatenate([before[parents], real], axis=1)
    return real, np.maximum(real.cumsum(axis=1) - 1, 0)[:, -tokens.shape[1] :]
