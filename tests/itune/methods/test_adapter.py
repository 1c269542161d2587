"""The adapter against the paper's equations and parameter counts."""

from __future__ import annotations

import math

import pytest
import torch

from itune.methods.ituning.model import AdapterConfig, ITuningAdapter
from itune.runtime.errors import ItuneError
from tests.conftest import refused


def random_adapter(**config: object) -> ITuningAdapter:
    values = {"hidden_size": 12, "visual_width": 10, "bottleneck": 8} | config
    adapter = ITuningAdapter(AdapterConfig(**values))
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.normal_()
    return adapter.eval()


def test_equations_literally() -> None:
    torch.manual_seed(0)
    adapter = random_adapter(score_scale=1.0, lambda_=3.0)
    x, v = torch.randn(1, 5, 12), torch.randn(1, 7, 10)
    w = {name: p.detach() for name, p in adapter.named_parameters()}
    q = x[0] @ w["query.weight"].T + w["query.bias"]
    k = v[0] @ w["key.weight"].T + w["key.bias"]
    u = v[0] @ w["value.weight"].T + w["value.bias"]
    s = torch.exp(q @ k.T) / torch.exp(q @ k.T).sum(1, keepdim=True)
    expected = 3.0 * (s @ u) @ w["output.weight"].T + w["output.bias"]
    torch.testing.assert_close(adapter(x, *adapter.project(v))[0], expected, rtol=1e-4, atol=1e-4)


def test_heads_are_attention_side_by_side() -> None:
    torch.manual_seed(1)
    adapter = random_adapter(heads=2)
    x, v = torch.randn(3, 4, 12), torch.randn(3, 7, 10)
    keys, values = adapter.project(v)
    retrieved = torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(adapter.query(x)[..., h], keys[..., h], values[..., h])
            for h in (slice(0, 4), slice(4, 8))
        ],
        dim=-1,
    )
    torch.testing.assert_close(adapter(x, keys, values), adapter.output(retrieved), rtol=1e-4, atol=1e-4)


def test_rows_of_an_image_share_its_keys() -> None:
    torch.manual_seed(2)
    adapter = random_adapter()
    x, v = torch.randn(6, 4, 12), torch.randn(2, 7, 10)
    together = adapter(x, *adapter.project(v))
    repeated = adapter(x, *adapter.project(v.repeat_interleave(3, 0)))
    torch.testing.assert_close(together, repeated, rtol=1e-5, atol=1e-5)


def test_training_starts_from_the_untouched_language_model() -> None:
    adapter = ITuningAdapter(AdapterConfig(12, 10, 8))
    assert not adapter(torch.randn(2, 3, 12), *adapter.project(torch.randn(2, 5, 10))).any()


def test_default_score_scale_is_that_of_attention() -> None:
    assert AdapterConfig(12, 10, 8, heads=2).score_scale == 1 / math.sqrt(4)


def test_bottleneck_must_divide_into_heads() -> None:
    with refused(ItuneError, "--bottleneck 9", "--heads 2"):
        AdapterConfig(12, 10, 9, heads=2)


@pytest.mark.parametrize(
    ("hidden_size", "layers", "millions"), [(768, 12, 14.2), (1024, 24, 44.1), (1280, 36, 94.5), (1280, 18, 47.2)]
)
def test_the_papers_parameter_counts(hidden_size: int, layers: int, millions: float) -> None:
    config = AdapterConfig(hidden_size, 768, hidden_size // 2)
    with torch.device("meta"):
        built = sum(weight.numel() for weight in ITuningAdapter(config).parameters()) * layers
    assert round(built / 1e6, 1) == millions
