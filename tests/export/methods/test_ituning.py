from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from itune.export.methods.ituning import merge, unmerge
from itune.runtime.bundle import DecoderSettings


def random_weights(
    rng: np.random.Generator, width: int, inner: int, r: int, layers: int, first: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    language_model = {"transformer.wte.weight": normal(7, width)}
    adapters = {}
    for i in range(layers):
        mlp = f"transformer.h.{i}.mlp"
        language_model |= {f"{mlp}.c_fc.weight": normal(width, inner), f"{mlp}.c_fc.bias": normal(inner)}
        language_model |= {f"{mlp}.c_proj.weight": normal(inner, width), f"{mlp}.c_proj.bias": normal(width)}
    for i in range(first, layers):
        adapters |= {f"layers.{i}.query.weight": normal(r, width), f"layers.{i}.query.bias": normal(r)}
        adapters |= {f"layers.{i}.output.weight": normal(width, r), f"layers.{i}.output.bias": normal(width)}
    return language_model, adapters


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    width=st.integers(1, 9),
    inner=st.integers(1, 9),
    r=st.integers(1, 9),
    layers=st.integers(1, 12),
    dropped=st.integers(0, 11),
    score_scale=st.floats(0.01, 3),
    lambda_=st.floats(1, 10),
)
def test_unmerge_restores_what_was_merged(seed, width, inner, r, layers, dropped, score_scale, lambda_):
    first = min(dropped, layers - 1)
    language_model, adapters = random_weights(np.random.default_rng(seed), width, inner, r, layers, first)
    merged = merge(language_model, adapters, score_scale=score_scale, lambda_=lambda_)
    shape = {"adapter_layers": list(range(first, layers)), "bottleneck": r}
    restored = unmerge(DecoderSettings.model_construct(**shape, score_scale=score_scale, lambda_=lambda_), merged)
    for before, after in zip((language_model, adapters), restored, strict=True):
        assert before.keys() == after.keys()
        for name, weight in before.items():
            assert after[name].dtype == np.float32
            if name in language_model or name.endswith("output.bias"):
                np.testing.assert_array_equal(after[name], weight, err_msg=name)
            else:  # multiplied and divided: twice half a unit in the last place
                np.testing.assert_allclose(after[name], weight, rtol=2.5e-7, err_msg=name)


def test_merged_products_are_the_papers_equations():
    rng = np.random.default_rng(0)
    language_model, adapters = random_weights(rng, 6, 10, 4, 1, 0)
    merged = merge(language_model, adapters, score_scale=0.3, lambda_=2.5)
    x, su = rng.standard_normal((5, 6)), rng.standard_normal((5, 4))
    fc, proj = merged["transformer.h.0.mlp.c_fc.weight"], merged["transformer.h.0.mlp.c_proj.weight"]
    product = x @ fc + merged["transformer.h.0.mlp.c_fc.bias"]
    query = x @ adapters["layers.0.query.weight"].T + adapters["layers.0.query.bias"]
    plain = x @ language_model["transformer.h.0.mlp.c_fc.weight"]
    np.testing.assert_allclose(product[:, 10:], 0.3 * query, rtol=1e-5)
    np.testing.assert_allclose(product[:, :10], plain + language_model["transformer.h.0.mlp.c_fc.bias"], rtol=1e-5)

    joined = np.concatenate([product[:, :10], su], axis=1) @ proj
    expected = product[:, :10] @ language_model["transformer.h.0.mlp.c_proj.weight"]
    expected += 2.5 * su @ adapters["layers.0.output.weight"].T
    np.testing.assert_allclose(joined, expected, rtol=1e-5)
