"""The int8 grids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune.export.quantize.weights import (
    BLOCK_SIZES,
    dequantize_blockwise,
    dequantize_per_channel,
    quantize_blockwise,
    quantize_per_channel,
    snap_blockwise,
    snap_per_channel,
)

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 200))


def random_weight(seed: int, shape: tuple[int, ...], size: float) -> np.ndarray:
    weight = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    weight[0] = 0  # a dead row must not divide by zero
    return weight * np.float32(size)


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 1000), shape=SHAPES, size=st.sampled_from([1e-6, 1.0, 1e6]), bits=st.sampled_from([8, 4]))
def test_blockwise(seed, shape, size, bits):
    weight, block_size = random_weight(seed, shape, size), BLOCK_SIZES[bits]
    codes, scales = quantize_blockwise(weight, bits)
    blocks = -(-shape[1] // block_size)
    assert codes.shape == (shape[0], blocks, block_size * bits // 8)
    assert scales.shape == (shape[0], blocks)
    if bits == 8:
        assert codes.min() >= 1  # symmetric: 255 is +127, 1 is -127
    back = dequantize_blockwise(codes, scales, shape[1], bits)
    # In 4 bits the largest value is -8 steps; what is as large with the other sign is cut off at 7.
    steps = np.abs(scales).repeat(block_size, axis=1)[:, : shape[1]]
    assert (np.abs(back - weight) <= (0.5001 if bits == 8 else 1.0001) * steps).all()

    again, scales_again = quantize_blockwise(snap_blockwise(weight, bits), bits)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_allclose(scales_again, scales, rtol=2e-7)


def test_the_first_of_two_4_bit_codes_is_the_lower():
    weight = np.float32([[-8, 7, 3, -1, *[0] * 28]])
    codes, scales = quantize_blockwise(weight, 4)
    assert scales.tolist() == [[1.0]]
    assert codes[0, 0, :2].tolist() == [0 | 15 << 4, 11 | 7 << 4]


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), shape=SHAPES, size=st.sampled_from([1e-6, 1.0, 1e6]))
def test_per_channel(seed, shape, size):
    weight = random_weight(seed, (*shape, 1, 3), size)
    codes, scales = quantize_per_channel(weight)
    assert codes.dtype == np.int8
    assert codes.shape == weight.shape
    assert np.abs(codes.astype(int)).max() <= 127
    back = dequantize_per_channel(codes, scales)
    assert (np.abs(back - weight) <= 0.5001 * scales[:, None, None, None]).all()
    np.testing.assert_array_equal(quantize_per_channel(snap_per_channel(weight))[0], codes)


@pytest.mark.parametrize("scale", [0.125, 1 / 3, 7.7])
def test_scaling_a_snapped_weight_keeps_its_codes(scale):
    """Merging multiplies W_q and W_o: an adapter that was snapped before ships with the same integers."""
    codes, scales = quantize_blockwise(random_weight(0, (40, 192), 0.02))
    scaled = dequantize_blockwise(codes, scales, 192) * np.float32(scale)
    np.testing.assert_array_equal(quantize_blockwise(scaled)[0], codes)
