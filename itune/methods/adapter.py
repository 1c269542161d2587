"""I-Tuning adapters: Luo et al., "I-Tuning: Tuning Frozen Language Models with Image for Lightweight Image
Captioning" (https://arxiv.org/abs/2202.06574), equations 1-5.

Beside the feed-forward block of a frozen decoder layer, with X its input and V the visual embeddings:

    Q = X W_q + b_q      K = V W_k + b_k      U = V W_v + b_v
    S = softmax(score_scale * Q K^T)
    dh = lambda * (S U) W_o + b_o
    layer output = residual + FFN(X) + dh
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from ..runtime.errors import ItuneError


@dataclass(frozen=True)
class AdapterConfig:
    """Shape and scales of every adapter of a model."""

    hidden_size: int
    """Width d of the language model."""

    visual_width: int
    """Width d_v of the visual embeddings."""

    bottleneck: int
    """Width r of queries, keys and values; d / 2 gives the paper's parameter counts."""

    heads: int = 1
    """Attention heads that share the bottleneck; the paper's equations have one."""

    lambda_: float = 1.0
    """The paper's lambda (>= 1): scales (S U) W_o, not b_o."""

    score_scale: float | None = None
    """Factor on Q K^T; None is 1/sqrt(r / heads), 1.0 is the paper's equation taken literally."""

    dropout: float = 0.0
    """Dropout on the retrieved S U while training."""

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.visual_width, self.bottleneck, self.heads) < 1:
            raise ItuneError(f"adapter sizes must be positive: {self}")
        if self.bottleneck % self.heads:
            raise ItuneError(f"--bottleneck {self.bottleneck} is not a multiple of --heads {self.heads}: choose one")
        if self.score_scale is None:
            object.__setattr__(self, "score_scale", 1 / math.sqrt(self.bottleneck // self.heads))


class ITuningAdapter(nn.Module):
    """One layer's adapter: reads the image into the hidden states."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.hidden_size, config.bottleneck)
        self.key = nn.Linear(config.visual_width, config.bottleneck)
        self.value = nn.Linear(config.visual_width, config.bottleneck)
        self.output = nn.Linear(config.bottleneck, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        # Training starts from the untouched language model.
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def project(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """K and U of visual embeddings [images, N, d_v]: two tensors [images, N, r] (equation 2)."""
        return self.key(visual), self.value(visual)

    def attention(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """S [images, heads, queries, N] in float32, for hidden [rows, T, d] of rows grouped by image.

        The rows of an image are its queries side by side (queries = rows / images * T), so that K and U are
        neither repeated per caption in training nor per beam in search.
        """
        images, tokens, _ = keys.shape
        heads = self.config.heads
        q = self.query(hidden).reshape(images, -1, heads, self.config.bottleneck // heads).transpose(1, 2)
        k = keys.reshape(images, tokens, heads, -1).permute(0, 2, 3, 1)
        scores = (q @ k).float() * self.config.score_scale
        weights: Tensor = scores.softmax(dim=-1)  # [images, heads, queries, N]
        return weights

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Delta h [rows, T, d] for the feed-forward input `hidden` [rows, T, d] (equations 1, 3, 4, 5)."""
        weights = self.attention(hidden, keys).to(values.dtype)
        u = values.reshape(*values.shape[:2], self.config.heads, -1).transpose(1, 2)
        retrieved = (weights @ u).transpose(1, 2)  # [images, queries, heads, r / heads]
        retrieved = self.dropout(retrieved.reshape(*hidden.shape[:2], -1))
        delta: Tensor = self.config.lambda_ * (retrieved @ self.output.weight.T) + self.output.bias
        return delta


def count_parameters(config: AdapterConfig, layers: int) -> int:
    """Trainable parameters of adapters on `layers` layers, biases included."""
    d, v, r = config.hidden_size, config.visual_width, config.bottleneck
    return layers * ((d + 1) * r + 2 * (v + 1) * r + (r + 1) * d)
