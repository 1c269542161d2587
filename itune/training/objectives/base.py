"""The interface of an objective, and what all objectives share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...methods.base import CaptionModel
from ..batches import Batch
from ..config import TrainConfig

_ENTROPY_STEPS = 50
"""The attention entropy costs a forward pass, so it is measured only this often."""


class Objective(ABC):
    """Computes the gradients of an optimizer step."""

    shown: ClassVar[tuple[str, ...]] = ("loss",)
    """The metrics to watch while training."""

    def __init__(self, config: TrainConfig, model: CaptionModel) -> None:
        self.config, self.model = config, model
        self.device = model.language_model.device

    @abstractmethod
    def backward(self, step: int, batches: Sequence[Batch], visuals: Iterable[Tensor]) -> dict[str, float]:
        """Add the gradients of an optimizer step to those of the weights, and return the step's metrics.

        `visuals`: the embeddings [images, N, d_v] of each batch, on the model's device. Random numbers come from
        torch's default generators, which are seeded for every step.
        """

    def autocast(self) -> Any:
        """The precision of forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def entropy(self, step: int, batch: Batch, visual: Tensor) -> dict[str, float]:
        """The attention entropy as a metric, every so many steps, if the method attends to the image."""
        if step % _ENTROPY_STEPS:
            return {}
        # In its own block: older torch caches the cast weights, which have no gradient here.
        with self.autocast():
            entropy = self.model.attention_entropy(batch.input_ids, batch.mask, visual, batch.packing)
        return {} if entropy is None else {"attention_entropy": entropy}
