"""SmallCap: Ramos et al., "SmallCap: Lightweight Image Captioning Prompted with Retrieval Augmentation"
(https://arxiv.org/abs/2209.15323), section 3.1; `runtime.retrieval.prompts` writes the prompt of retrieved captions.

Every block of a frozen GPT-2 gains cross-attention to the image between self-attention and feed-forward, with X the
hidden states there and V the visual embeddings of one image:

    Q = LN(X) W_q + b_q      K = V W_k + b_k      U = V W_v + b_v      (heads of width w)
    X + concat(softmax(Q K^T / sqrt(w)) U) W_o + b_o

The paper saves parameters by making w smaller than GPT-2's 64: 32, 16, 8 or 4.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from ...runtime.settings import Method
from ...training.config import TrainConfig
from ..attention import AttendingModel, ImageAttention
from ..base import ModelConfig
from .settings import SmallCapCheckpoint

_RETURNS_TUPLE = "output_attentions" in inspect.signature(GPT2Block.forward).parameters
"""Whether a block of the installed transformers returns a tuple, as in the first 5.x releases."""


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Shape of every cross-attention layer of a model."""

    hidden_size: int  # width d of the language model
    visual_width: int  # width d_v of the visual embeddings
    heads: int  # paper: 12, as GPT-2 has
    head_width: int = 16  # width w of each head's queries, keys and values
    dropout: float = 0.0  # on what is retrieved from the image, while training
    norm_epsilon: float = 1e-5  # of the layer norm before the queries: the language model's

    @property
    def width(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_width


class CrossAttention(ImageAttention):
    """One block's cross-attention to the image."""

    def __init__(self, config: CrossAttentionConfig, layers: int) -> None:
        """`layers`: how many the language model has; W_o is initialised smaller in a deeper model."""
        d, w = config.hidden_size, config.head_width
        super().__init__(d, config.visual_width, config.width, config.heads, 1 / math.sqrt(w), config.dropout)
        # The authors' code freezes all weights without "crossattention" in their names, and so `ln_cross_attn`.
        self.norm = nn.LayerNorm(d, eps=config.norm_epsilon).requires_grad_(False)
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.zeros_(linear.bias)
            # GPT-2's: 0.02, and smaller where it adds to the residual stream.
            nn.init.normal_(linear.weight, std=0.02 / (math.sqrt(2 * layers) if linear is self.output else 1))

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What cross-attention adds to `hidden` [rows, T, d], the sum after self-attention."""
        added: Tensor = self.output(self.retrieve(self.norm(hidden), keys, values))
        return added


class CrossAttendingBlock(GPT2Block):  # type: ignore[no-untyped-call]
    """GPT-2's block with cross-attention to the image between self-attention and feed-forward."""

    cross_attention: CrossAttention
    keys: Tensor
    values: Tensor

    def __init__(self, block: GPT2Block, cross_attention: CrossAttention) -> None:
        nn.Module.__init__(self)
        self.ln_1, self.attn, self.ln_2, self.mlp = block.ln_1, block.attn, block.ln_2, block.mlp
        # Past `nn.Module.__setattr__`: it belongs to `CaptionModel.adapters`, not to GPT-2's parameters.
        self.__dict__["cross_attention"] = cross_attention

    def forward(self, hidden: Tensor, *cache_and_mask: Any, **options: Any) -> Any:
        """Hidden states [rows, T, d] to the same; the other arguments are for GPT-2's self-attention."""
        attended, _ = self.attn(self.ln_1(hidden), *cache_and_mask, **options)
        hidden = hidden + attended
        hidden = hidden + self.cross_attention(hidden, self.keys, self.values)
        hidden = hidden + self.mlp(self.ln_2(hidden))
        return (hidden,) if _RETURNS_TUPLE else hidden


class SmallCapModel(AttendingModel):
    """A frozen language model with cross-attention in every block."""

    method: ClassVar[Method] = "smallcap"

    def __init__(self, language_model: GPT2LMHeadModel, config: CrossAttentionConfig) -> None:
        blocks: Any = language_model.transformer.h
        layers = [CrossAttention(config, len(blocks)) for _ in blocks]
        for i, layer in enumerate(layers):
            blocks[i] = CrossAttendingBlock(blocks[i], layer)
        super().__init__(language_model, dict(enumerate(layers)), dict(enumerate(blocks)))
        self.config, self.layers = config, layers

    @classmethod
    def create(cls, config: ModelConfig, language_model: GPT2LMHeadModel, visual: tuple[int, int]) -> Self:
        """A model as `config` describes it, with fresh adapters, for visual embeddings of shape `visual` = (N, d_v)."""
        assert isinstance(config, TrainConfig | SmallCapCheckpoint)
        gpt2 = language_model.config
        heads, norm_epsilon = config.heads or gpt2.n_head, gpt2.layer_norm_epsilon
        shape = (gpt2.n_embd, visual[1], heads, config.attention_width, config.dropout, norm_epsilon)
        return cls(language_model, CrossAttentionConfig(*shape))

    def describe(self) -> dict[str, Any]:
        """The heads and their width."""
        return {"heads": self.config.heads, "attention_width": self.config.head_width}
