"""I-Tuning in PyTorch: a frozen GPT-2 whose feed-forward blocks are joined by the adapters of `adapter.py`.

This eager model is the reference that the exported graphs are verified against; `eager.EagerEngine` drives it with
the same search as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from ..checkpoint import CheckpointConfig, CheckpointError, ITuningCheckpoint
from ..runtime.settings import Method
from ..training.config import TrainConfig
from .adapter import AdapterConfig, ITuningAdapter
from .base import CaptionModel, Visual


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
