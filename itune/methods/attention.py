"""Attention from the language model to the image: the part that I-Tuning and SmallCap share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from .base import CaptionModel, Visual


class ImageAttention(nn.Module):
    """Multi-head attention of hidden states over the visual embeddings of their image.

        Q = X W_q + b_q      K = V W_k + b_k      U = V W_v + b_v
        S = softmax(scale * Q K^T)

    Hidden states are [rows, T, d] with rows grouped by image. An image's rows become one sequence of queries, so
    K and U need no copy for each caption in training or each beam in search.
    """

    def __init__(
        self, hidden_size: int, visual_width: int, width: int, heads: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.query = nn.Linear(hidden_size, width)
        self.key = nn.Linear(visual_width, width)
        self.value = nn.Linear(visual_width, width)
        self.output = nn.Linear(width, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.recorded: list[Tensor] | None = None

    def project(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """K and U of visual embeddings [images, N, d_v]: two tensors [images, N, width]."""
        return self.key(visual), self.value(visual)

    def attention(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """S [images, heads, queries, N] in float32, where queries = rows / images * T."""
        images, tokens, width = keys.shape
        q = self.query(hidden).reshape(images, -1, self.heads, width // self.heads).transpose(1, 2)
        k = keys.reshape(images, tokens, self.heads, -1).permute(0, 2, 3, 1)
        weights: Tensor = ((q @ k).float() * self.scale).softmax(dim=-1)
        return weights

    def retrieve(self, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """S U [rows, T, width], with dropout while training."""
        weights = self.attention(hidden, keys)
        if self.recorded is not None:
            self.recorded.append(weights)
        u = values.reshape(*values.shape[:2], self.heads, -1).transpose(1, 2)
        retrieved = (weights.to(u.dtype) @ u).transpose(1, 2)  # [images, queries, heads, width / heads]
        dropped: Tensor = self.dropout(retrieved.reshape(*hidden.shape[:2], -1))
        return dropped


class AttendingModel(CaptionModel):
    """A frozen language model with attention to the image in some layers."""

    attending: Mapping[int, ImageAttention]

    def __init__(
        self,
        language_model: GPT2LMHeadModel,
        adapters: Mapping[int, ImageAttention],
        blocks: Mapping[int, nn.Module],
    ) -> None:
        """`blocks`: by layer, the module of `language_model` that calls the adapter with its `keys` and `values`."""
        super().__init__(language_model, nn.ModuleDict({str(i): adapter for i, adapter in adapters.items()}))
        self.attending, self.blocks = adapters, blocks
        self.adapter_layers = list(adapters)

    def project(self, visual: Tensor) -> Visual:
        """K and U of every adapted layer i, `i.keys` and `i.values` [images, N, width]."""
        projected: Visual = {}
        for i, adapter in self.attending.items():
            projected[f"{i}.keys"], projected[f"{i}.values"] = adapter.project(visual)
        return projected

    @contextmanager
    def looking_at(self, visual: Visual) -> Iterator[None]:
        """Show these images to the language model within the block."""
        for i, block in self.blocks.items():
            block.keys, block.values = visual[f"{i}.keys"], visual[f"{i}.values"]
        try:
            yield
        finally:
            for block in self.blocks.values():
                del block.keys, block.values

    @contextmanager
    def recording(self, weights: list[Tensor]) -> Iterator[None]:
        """Append every layer's attention [images, heads, queries, N] to `weights` within the block."""
        for adapter in self.attending.values():
            adapter.recorded = weights
        try:
            yield
        finally:
            for adapter in self.attending.values():
                adapter.recorded = None
