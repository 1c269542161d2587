"""SmallCap: Ramos et al., "SmallCap: Lightweight Image Captioning Prompted with Retrieval Augmentation"
(https://arxiv.org/abs/2209.15323), section 3.1; the prompt of retrieved captions is `runtime.prompts`.

In every block of a frozen GPT-2, between self-attention and feed-forward, cross-attention to the image is added, with X
the hidden states there and V the visual embeddings of one image:

    Q = LN(X) W_q + b_q      K = V W_k + b_k      U = V W_v + b_v      (heads of width w)
    X + concat(softmax(Q K^T / sqrt(w)) U) W_o + b_o

The paper makes w smaller than GPT-2's 64, which is where the parameters are saved: 64, 32, 16, 8 or 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from ...checkpoint import CheckpointConfig
from ...runtime.errors import ItuneError
from ...runtime.settings import Method
from ...training.config import TrainConfig
from ..base import CaptionModel, Visual
from .settings import SmallCapCheckpoint


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Shape of every cross-attention layer of a model."""

    hidden_size: int
    """Width d of the language model."""

    visual_width: int
    """Width d_v of the visual embeddings."""

    heads: int
    """Attention heads (paper: 12, which are GPT-2's)."""

    head_width: int = 16
    """Width w of each head's queries, keys and values."""

    dropout: float = 0.0
    """Dropout on what is retrieved from the image, while training."""

    norm_epsilon: float = 1e-5
    """Of the layer norm before the queries: the language model's."""

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.visual_width, self.heads, self.head_width) < 1:
            raise ItuneError(f"--heads {self.heads} and --attention-width {self.head_width} must be positive")

    @property
    def width(self) -> int:
        """Of all heads together."""
        return self.heads * self.head_width


class CrossAttention(nn.Module):
    """One block's cross-attention to the image."""

    def __init__(self, config: CrossAttentionConfig, layers: int) -> None:
        """`layers`: of the language model, by which the initialisation of W_o depends."""
        super().__init__()
        self.config = config
        # The original freezes all whose name lacks "crossattention", and so `ln_cross_attn`, as it was initialised.
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon).requires_grad_(False)
        self.query = nn.Linear(config.hidden_size, config.width)
        self.key = nn.Linear(config.visual_width, config.width)
        self.value = nn.Linear(config.visual_width, config.width)
        self.output = nn.Linear(config.width, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.zeros_(linear.bias)
            # GPT-2's: 0.02, and smaller where it adds to the residual stream.
            nn.init.normal_(linear.weight, std=0.02 / (math.sqrt(2 * layers) if linear is self.output else 1))

    def project(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """K and U of visual embeddings [images, N, d_v]: two tensors [images, N, heads * w]."""
        return self.key(visual), self.value(visual)

    def attention(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """Weights [images, heads, queries, N] in float32, for hidden [rows, T, d] of rows grouped by image.

        The rows of an image are its queries side by side: queries = rows / images * T.
        """
        images, tokens, _ = keys.shape
        heads, width = self.config.heads, self.config.head_width
        q = self.query(self.norm(hidden)).reshape(images, -1, heads, width).transpose(1, 2)
        k = keys.reshape(images, tokens, heads, width).permute(0, 2, 3, 1)
        weights: Tensor = ((q @ k).float() / math.sqrt(width)).softmax(dim=-1)
        return weights

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What is added to `hidden` [rows, T, d], the sum after self-attention."""
        weights = self.attention(hidden, keys).to(values.dtype)
        u = values.reshape(*values.shape[:2], self.config.heads, -1).transpose(1, 2)
        retrieved = (weights @ u).transpose(1, 2).reshape(*hidden.shape[:2], -1)
        added: Tensor = self.output(self.dropout(retrieved))
        return added


class SmallCapModel(CaptionModel):
    """A frozen language model with cross-attention in every block."""

    method: ClassVar[Method] = "smallcap"

    def __init__(self, language_model: GPT2LMHeadModel, config: CrossAttentionConfig) -> None:
        blocks: Any = language_model.transformer.h
        layers = [CrossAttention(config, len(blocks)) for _ in blocks]
        super().__init__(language_model, nn.ModuleDict({str(i): layer for i, layer in enumerate(layers)}))
        self.config = config
        self._inputs: list[Tensor | None] = [None] * len(blocks)
        for i, block in enumerate(blocks):
            # (input + attention) + cross-attention of it = input + (attention + cross-attention of it)
            block.ln_1.register_forward_pre_hook(self._keep_input(i))
            block.attn.register_forward_hook(self._add_cross_attention(i))

    @classmethod
    def create(cls, config: TrainConfig, language_model: GPT2LMHeadModel, tokens: int, width: int) -> Self:  # noqa: ARG003
        """See `CaptionModel.create`."""
        return cls._build(language_model, width, config.heads, config.attention_width, config.dropout)

    @classmethod
    def from_checkpoint(cls, config: CheckpointConfig, language_model: GPT2LMHeadModel) -> Self:
        """See `CaptionModel.from_checkpoint`."""
        assert isinstance(config, SmallCapCheckpoint)
        dropout = config.dropout
        return cls._build(language_model, config.vision.width, config.heads, config.attention_width, dropout)

    @classmethod
    def _build(
        cls, language_model: GPT2LMHeadModel, visual_width: int, heads: int | None, head_width: int, dropout: float
    ) -> Self:
        gpt2 = language_model.config
        config = CrossAttentionConfig(
            hidden_size=gpt2.n_embd,
            visual_width=visual_width,
            heads=heads or gpt2.n_head,
            head_width=head_width,
            dropout=dropout,
            norm_epsilon=gpt2.layer_norm_epsilon,
        )
        return cls(language_model, config)

    def describe(self) -> dict[str, Any]:
        """See `CaptionModel.describe`."""
        return {"heads": self.config.heads, "attention_width": self.config.head_width}

    @property
    def layers(self) -> list[CrossAttention]:
        """The cross-attention of every block."""
        assert isinstance(self.adapters, nn.ModuleDict)
        return [layer for layer in self.adapters.values() if isinstance(layer, CrossAttention)]

    def project(self, visual: Tensor) -> Visual:
        """K and U of every block i, `i.keys` and `i.values` [images, N, heads * w]."""
        projected: Visual = {}
        for i, layer in enumerate(self.layers):
            projected[f"{i}.keys"], projected[f"{i}.values"] = layer.project(visual)
        return projected

    @contextmanager
    def watched(self, weights: list[Tensor]) -> Iterator[None]:
        """See `CaptionModel.watched`."""

        def record(i: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                weights.append(self.layers[i].attention(inputs[0], self.seen()[f"{i}.keys"]))

            return hook

        hooks = [layer.register_forward_pre_hook(record(i)) for i, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep_input(self, i: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._inputs[i] = inputs[0]

        return hook

    def _add_cross_attention(self, i: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
            attended, *others = output
            residual, self._inputs[i] = self._inputs[i], None
            assert residual is not None
            visual = self.seen()
            added = self.layers[i](residual + attended, visual[f"{i}.keys"], visual[f"{i}.values"])
            return (attended + added, *others)

        return hook


def count_parameters(config: CrossAttentionConfig, layers: int) -> int:
    """Trainable parameters of `layers` blocks, biases included."""
    d, v, w = config.hidden_size, config.visual_width, config.width
    return layers * ((d + 1) * w + 2 * (v + 1) * w + (w + 1) * d)
