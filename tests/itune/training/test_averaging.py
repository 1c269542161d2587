"""The moving average against its recursion, written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from itune.training.averaging import moving_average


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_the_average_follows_the_weights(decay: float) -> None:
    module = nn.Linear(3, 2)
    average = moving_average(module, decay)
    expected = [weight.detach().double() for weight in module.parameters()]
    for step in range(20):
        with torch.no_grad():
            for weight in module.parameters():
                weight.add_(torch.randn(weight.shape))
        average.update_parameters(module)
        kept = min(decay, (1 + step) / (10 + step))
        pairs = zip(expected, module.parameters(), strict=True)
        expected = [kept * old + (1 - kept) * weight.detach().double() for old, weight in pairs]
        for found, value in zip(average.module.parameters(), expected, strict=True):
            torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-5)
