"""I-Tuning: Luo et al., "I-Tuning: Tuning Frozen Language Models with Image for Lightweight Image Captioning"
(https://arxiv.org/abs/2202.06574), equations 1-5.

Beside the feed-forward block of a frozen decoder layer, with X its input and V the visual embeddings:

    Q = X W_q + b_q      K = V W_k + b_k      U = V W_v + b_v
    S = softmax(score_scale * Q K^T)
    dh = lambda * (S U) W_o + b_o
    layer output = residual + FFN(X) + dh
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from ...checkpoint import CheckpointError
from ...runtime.errors import ItuneError
from ...runtime.settings import Method
from ...training.config import TrainConfig
from ..attention import AttendingModel, ImageAttention
from ..base import ModelConfig
from .settings import ITuningCheckpoint


@dataclass(frozen=True)
class AdapterConfig:
    """Shape and scales of every adapter of a model."""

    hidden_size: int  # width d of the language model
    visual_width: int  # width d_v of the visual embeddings
    bottleneck: int  # width r of queries, keys and values; d / 2 gives the paper's parameter counts
    heads: int = 1  # they share the bottleneck; the paper's equations have one head
    lambda_: float = 1.0  # the paper's lambda (>= 1): scales (S U) W_o, not b_o
    score_scale: float | None = None  # factor on Q K^T; None is 1/sqrt(r / heads), 1.0 is the paper's literal equation
    dropout: float = 0.0  # on the retrieved S U, while training

    def __post_init__(self) -> None:
        if self.bottleneck % self.heads:
            raise ItuneError(f"--bottleneck {self.bottleneck} is not a multiple of --heads {self.heads}: change one")
        if self.score_scale is None:
            object.__setattr__(self, "score_scale", 1 / math.sqrt(self.bottleneck // self.heads))


class ITuningAdapter(ImageAttention):
    """One layer's adapter: reads the image into the hidden states."""

    def __init__(self, config: AdapterConfig) -> None:
        d, d_v, r, scale = config.hidden_size, config.visual_width, config.bottleneck, config.score_scale
        assert scale is not None
        super().__init__(d, d_v, r, config.heads, scale, config.dropout)
        self.lambda_ = config.lambda_
        # Training starts from the untouched language model.
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The adapter's dh [rows, T, d] for the feed-forward input `hidden` [rows, T, d] (equations 1, 3 and 4)."""
        retrieved = self.retrieve(hidden, keys, values)
        delta: Tensor = self.lambda_ * (retrieved @ self.output.weight.T) + self.output.bias
        return delta


class AdaptedFeedForward(GPT2MLP):
    """GPT-2's feed-forward block with an adapter beside it."""

    adapter: ITuningAdapter
    keys: Tensor
    values: Tensor

    def __init__(self, mlp: GPT2MLP, adapter: ITuningAdapter) -> None:
        nn.Module.__init__(self)
        self.c_fc, self.c_proj, self.act, self.dropout = mlp.c_fc, mlp.c_proj, mlp.act, mlp.dropout
        # Past `nn.Module.__setattr__`: the adapter belongs to `CaptionModel.adapters`, not to GPT-2's parameters.
        self.__dict__["adapter"] = adapter

    def forward(self, x: Any) -> Tensor:
        """FFN(X) + dh [rows, T, d]; GPT-2's block adds the residual (equation 5)."""
        output: Tensor = super().forward(x) + self.adapter(x, self.keys, self.values)
        return output


class ITuningModel(AttendingModel):
    """A frozen language model with adapters on the decoder layers from `first_adapter_layer` up.

    Below the first adapter nothing needs a gradient, so autograd keeps no activations there (the paper's Dropping).
    """

    method: ClassVar[Method] = "i-tuning"
    attending: Mapping[int, ITuningAdapter]

    def __init__(self, language_model: GPT2LMHeadModel, config: AdapterConfig, first_adapter_layer: int = 0) -> None:
        layers: Any = language_model.transformer.h
        if first_adapter_layer >= len(layers):
            raise CheckpointError(
                f"first_adapter_layer {first_adapter_layer}: the language model has {len(layers)} layers, from 0"
            )
        adapters = {i: ITuningAdapter(config) for i in range(first_adapter_layer, len(layers))}
        for i, adapter in adapters.items():
            layers[i].mlp = AdaptedFeedForward(layers[i].mlp, adapter)
        super().__init__(language_model, adapters, {i: layers[i].mlp for i in adapters})
        self.config = config

    @classmethod
    def create(cls, config: ModelConfig, language_model: GPT2LMHeadModel, visual: tuple[int, int]) -> Self:
        """A model as `config` describes it, with fresh adapters, for visual embeddings of shape `visual` = (N, d_v)."""
        assert isinstance(config, TrainConfig | ITuningCheckpoint)
        gpt2 = language_model.config
        bottleneck, heads = config.bottleneck or gpt2.n_embd // 2, config.heads or gpt2.n_head
        shape = (gpt2.n_embd, visual[1], bottleneck, heads, config.lambda_, config.score_scale, config.dropout)
        return cls(language_model, AdapterConfig(*shape), config.first_adapter_layer)

    def describe(self) -> dict[str, Any]:
        """The adapters' shape and scales, and the first layer with an adapter."""
        return {
            "bottleneck": self.config.bottleneck,
            "heads": self.config.heads,
            "lambda": self.config.lambda_,
            "score_scale": self.config.score_scale,
            "first_adapter_layer": self.adapter_layers[0],
        }

    def adapter(self, layer: int) -> ITuningAdapter:
        """The adapter of a decoder layer."""
        return self.attending[layer]
