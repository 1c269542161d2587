"""The moving average of a training's weights, which is what is evaluated and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of weights by name."""

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float) -> None:
        """`decay` per step; 0 makes the average the weights themselves."""
        self.weights, self.decay = weights, decay
        self.values: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights in, after optimiser step `step`."""
        # The decay ramps up, or the average would remember the initialisation for hundreds of steps.
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in self.weights.items():
            self.values[name].lerp_(weight, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights as they are."""
        for name, weight in self.weights.items():
            self.values[name].copy_(weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, the weights hold the average."""
        kept = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._set(self.values)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])
