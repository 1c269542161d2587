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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from ...checkpoint import CheckpointConfig, CheckpointError
from ...runtime.errors import ItuneError
from ...runtime.settings import Method
from ...training.config import TrainConfig
from ..base import CaptionModel, Visual
from .settings import ITuningCheckpoint


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


class ITuningModel(CaptionModel):
    """A frozen language model with adapters on the decoder layers from `first_adapter_layer` up.

    Below the first adapter nothing needs a gradient, so autograd keeps no activations there (the paper's Dropping).
    """

    method: ClassVar[Method] = "i-tuning"

    def __init__(self, language_model: GPT2LMHeadModel, config: AdapterConfig, first_adapter_layer: int = 0) -> None:
        blocks: Any = language_model.transformer.h
        if not 0 <= first_adapter_layer < len(blocks):
            raise CheckpointError(
                f"first adapter layer {first_adapter_layer} does not exist: "
                f"the language model has {len(blocks)} layers, numbered from 0"
            )
        layers = range(first_adapter_layer, len(blocks))
        super().__init__(language_model, nn.ModuleDict({str(i): ITuningAdapter(config) for i in layers}))
        self.config = config
        for i in self.adapter_layers:
            blocks[i].mlp.register_forward_hook(self._add_adapter(i))

    @classmethod
    def create(cls, config: TrainConfig, language_model: GPT2LMHeadModel, tokens: int, width: int) -> Self:  # noqa: ARG003
        """See `CaptionModel.create`."""
        hidden_size = language_model.config.n_embd
        adapters = AdapterConfig(
            hidden_size=hidden_size,
            visual_width=width,
            bottleneck=config.bottleneck or hidden_size // 2,
            heads=config.heads or language_model.config.n_head,
            lambda_=config.lambda_,
            score_scale=config.score_scale,
            dropout=config.dropout,
        )
        return cls(language_model, adapters, config.first_adapter_layer)

    @classmethod
    def from_checkpoint(cls, config: CheckpointConfig, language_model: GPT2LMHeadModel) -> Self:
        """See `CaptionModel.from_checkpoint`."""
        assert isinstance(config, ITuningCheckpoint)
        adapters = AdapterConfig(
            hidden_size=language_model.config.n_embd,
            visual_width=config.vision.width,
            bottleneck=config.bottleneck,
            heads=config.heads,
            lambda_=config.lambda_,
            score_scale=config.score_scale,
            dropout=config.dropout,
        )
        return cls(language_model, adapters, config.first_adapter_layer)

    def describe(self) -> dict[str, Any]:
        """See `CaptionModel.describe`."""
        return {
            "bottleneck": self.config.bottleneck,
            "heads": self.config.heads,
            "lambda": self.config.lambda_,
            "score_scale": self.config.score_scale,
            "first_adapter_layer": self.adapter_layers[0],
        }

    @property
    def adapter_layers(self) -> list[int]:
        """The decoder layers that carry an adapter."""
        assert isinstance(self.adapters, nn.ModuleDict)
        return [int(i) for i in self.adapters]

    def adapter(self, layer: int) -> ITuningAdapter:
        """The adapter of a decoder layer."""
        assert isinstance(self.adapters, nn.ModuleDict)
        adapter = self.adapters[str(layer)]
        assert isinstance(adapter, ITuningAdapter)
        return adapter

    def project(self, visual: Tensor) -> Visual:
        """K and U of every adapted layer i, `i.keys` and `i.values` [images, N, r] (equation 2)."""
        projected: Visual = {}
        for i in self.adapter_layers:
            projected[f"{i}.keys"], projected[f"{i}.values"] = self.adapter(i).project(visual)
        return projected

    @contextmanager
    def watched(self, weights: list[Tensor]) -> Iterator[None]:
        """See `CaptionModel.watched`: the adapters' S (equation 3)."""
        blocks: Any = self.language_model.transformer.h

        def record(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                weights.append(self.adapter(layer).attention(inputs[0], self.seen()[f"{layer}.keys"]))

            return hook

        hooks = [blocks[i].mlp.register_forward_pre_hook(record(i)) for i in self.adapter_layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add_adapter(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            visual = self.seen()
            delta: Tensor = self.adapter(layer)(inputs[0], visual[f"{layer}.keys"], visual[f"{layer}.values"])
            return output + delta

        return hook


def count_parameters(config: AdapterConfig, layers: int) -> int:
    """Trainable parameters of adapters on `layers` layers, biases included."""
    d, v, r = config.hidden_size, config.visual_width, config.bottleneck
    return layers * ((d + 1) * r + 2 * (v + 1) * r + (r + 1) * d)
