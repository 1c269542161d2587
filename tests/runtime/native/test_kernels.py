"""Every instruction set of this processor against NumPy, and bit for bit against itself with other rows and threads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune.export.quantize.weights import BLOCK_SIZES, quantize_blockwise
from itune.runtime.engines.native import KERNELS

native = pytest.importorskip("_itune_native")

SIZES = st.tuples(st.integers(1, 14), st.integers(1, 70), st.integers(1, 150))  # rows, outputs, depth
every_kernel = pytest.mark.parametrize("kernels", KERNELS)
FUNCTIONS: dict[str, Any] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def random_floats(seed: int, *shape: int) -> np.ndarray:
    """Normal, with an outlier in every few hundred as language models have them."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.where(rng.random(shape) < 0.005, 50, 1)).astype(np.float32)


def quantize_rows(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [rows, blocks, block] and scales [rows, blocks]: the specification of the activations' integers."""
    blocks = -(-x.shape[1] // block)
    padded = np.zeros((len(x), blocks * block), np.float32)
    padded[:, : x.shape[1]] = x
    padded = padded.reshape(len(x), blocks, block)
    largest = np.abs(padded).max(axis=2)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(padded * inverse[..., None]).astype(np.int64), largest / np.float32(127)


def integer_product(x: np.ndarray, weight: np.ndarray, bits: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of a weight [N, K], and x W^T with integer sums in each block."""
    packed, scales = quantize_blockwise(weight, bits)
    codes = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    own, own_scales = quantize_rows(x, BLOCK_SIZES[bits])
    sums = np.einsum("rbk,nbk->rnb", own, codes.astype(np.int64) - 2 ** (bits - 1))
    products = (sums * own_scales[:, None].astype(np.float64) * scales[None]).sum(axis=2)
    return {f"weight.int{bits}": packed, "weight.scales": scales}, products


@every_kernel
@pytest.mark.parametrize("bits", [8, 4])
@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, threads=st.integers(1, 3), seed=st.integers(0, 99))
def test_integer_products(kernels: str, bits: int, sizes: tuple[int, int, int], threads: int, seed: int) -> None:
    rows, outputs, depth = sizes
    x, weight = random_floats(seed, rows, depth), random_floats(seed + 100, outputs, depth)
    tensors, expected = integer_product(x, weight, bits)
    found = native.multiply(kernels, tensors, x, outputs, True, threads)
    # The integer sums are exact: what is left is float32's rounding of as many terms as there are blocks.
    magnitude = np.abs(x) @ np.abs(weight).T
    assert (np.abs(found - expected) <= 1e-6 * magnitude + 1e-6).all()


@every_kernel
@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_codes_do_not_saturate(kernels: str, bits: int) -> None:
    """All codes 0 or the maximum, and activations of the largest magnitude: sums of up to 64 * 128 * 127."""
    depth, block = 256, BLOCK_SIZES[bits]
    rng = np.random.default_rng(0)
    codes = rng.choice(np.array([0, 255], np.uint8), (40, depth // block, block * bits // 8))
    tensors = {f"weight.int{bits}": codes, "weight.scales": np.ones(codes.shape[:2], np.float32)}
    x = rng.choice(np.array([-127, 127], np.float32), (5, depth))
    spread = codes if bits == 8 else np.stack([codes & 15, codes >> 4], axis=-1)
    expected = x @ (spread.reshape(40, depth).astype(np.float64) - 2 ** (bits - 1)).T
    np.testing.assert_array_equal(native.multiply(kernels, tensors, x, 40, True, 2), expected)


@every_kernel
@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, transposed=st.booleans(), seed=st.integers(0, 99))
def test_float_products(kernels: str, sizes: tuple[int, int, int], transposed: bool, seed: int) -> None:
    rows, outputs, depth = sizes
    x, weight = random_floats(seed, rows, depth), random_floats(seed + 100, outputs, depth)
    stored = weight if transposed else np.ascontiguousarray(weight.T)
    found = native.multiply(kernels, {"weight": stored}, x, outputs, transposed, 2)
    assert (np.abs(found - x.astype(np.float64) @ weight.T) <= 1e-6 * (np.abs(x) @ np.abs(weight).T) + 1e-6).all()


@every_kernel
@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
@settings(deadline=None, max_examples=20)
@given(sizes=SIZES, seed=st.integers(0, 99), data=st.data())
def test_rows_do_not_depend_on_each_other(
    kernels: str, kind: str, sizes: tuple[int, int, int], seed: int, data: st.DataObject
) -> None:
    """Bit for bit, whatever the number of rows and threads."""
    rows, outputs, depth = sizes
    x, weight = random_floats(seed, rows, depth), random_floats(seed + 100, outputs, depth)
    tensors = {"weight": weight} if kind == "float32" else integer_product(x, weight, int(kind[3:]))[0]
    together = native.multiply(kernels, tensors, x, outputs, True, 1)
    some = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows))
    threads = data.draw(st.integers(1, 4))
    np.testing.assert_array_equal(native.multiply(kernels, tensors, x[some], outputs, True, threads), together[some])


@every_kernel
@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_stays_visible(kernels: str, kind: str, bad: float) -> None:
    x, weight = random_floats(0, 2, 130), random_floats(1, 3, 130)
    x[1, 77] = bad
    tensors = {"weight": weight} if kind == "float32" else integer_product(x[:1], weight, int(kind[3:]))[0]
    found = native.multiply(kernels, tensors, x, 3, True, 1)
    assert np.isfinite(found[0]).all()
    assert not np.isfinite(found[1]).any()


@every_kernel
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("size", [1, 15, 33, 1000])
def test_activations(kernels: str, function: str, size: int) -> None:
    x = np.linspace(-12, 12, size).astype(np.float32)
    found = native.apply(kernels, function, x, 0.0)
    np.testing.assert_allclose(found, FUNCTIONS[function](x.astype(np.float64)), rtol=3e-6, atol=1e-6)


@every_kernel
@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 90), seed=st.integers(0, 99))
def test_sums(kernels: str, size: int, seed: int) -> None:
    x = random_floats(seed, size)
    wide = x.astype(np.float64)
    exponentials = np.exp(wide - wide.max())
    np.testing.assert_allclose(
        native.apply(kernels, "softmax", x, 0.5), np.exp(wide / 2) / np.exp(wide / 2).sum(), rtol=2e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        native.apply(kernels, "sum_of_exponentials", x, float(x.max())), [exponentials.sum()], rtol=2e-6
    )
    np.testing.assert_allclose(native.apply(kernels, "dot", x, 0.0), [wide @ wide], rtol=1e-5)
    np.testing.assert_allclose(native.apply(kernels, "add_scaled", x, -0.25), 0.75 * wide, rtol=1e-6)
    normed = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-3)
    np.testing.assert_allclose(native.apply(kernels, "layer_norm", x, 1e-3), normed, rtol=1e-4, atol=1e-5)


ONES = np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({}, "weight"),
        ({"weight": np.zeros((3, 5), np.float64)}, "weight"),
        ({"weight": np.zeros((5, 3), np.float32)}, "weight"),
        ({"weight.int8": np.zeros((3, 1, 64), np.uint8)}, "weight.scales"),
        ({"weight.int8": np.zeros((3, 2, 64), np.uint8), "weight.scales": ONES[:, :2]}, "weight.int8"),
        ({"weight.int4": np.zeros((3, 1, 64), np.uint8), "weight.scales": ONES[:, :1].copy()}, "weight.int4"),
        (
            {"weight.int4": np.zeros((3, 1, 16), np.uint8), "weight.scales": ONES[:, :2]},
            "weight.scales",
        ),
    ],
)
def test_wrong_weights_are_refused_by_name(tensors: dict[str, np.ndarray], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} "):
        native.multiply("", tensors, np.zeros((1, 5), np.float32), 3, True, 1)
