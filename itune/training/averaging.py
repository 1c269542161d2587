"""The moving average of a training's weights, which is evaluated and saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

_Tensors = list[Tensor] | tuple[Tensor, ...]


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of a module that follows its weights; call `update_parameters(module)` after every optimizer step.

    The n-th update keeps the share min(decay, n / (9 + n)) of the average: without this ramp it would remember the
    initialization for hundreds of steps. A decay of 0 makes the average equal to the weights.
    """

    @torch.no_grad()
    def update(averages: _Tensors, weights: _Tensors, updates: Tensor | int) -> None:
        n = int(updates)
        kept = min(decay, n / (9 + n))
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1 - kept)

    average = AveragedModel(module, multi_avg_fn=update)
    average.n_averaged.fill_(1)  # at 0 the first update would copy the weights
    return average
