"""Weights of fewer bits, in the layouts that the graphs use: symmetric integers, and half precision.

All quantisers are idempotent: quantising a dequantised weight gives the same integers again. So a backbone that was
snapped to a grid before the adapters were trained ships exactly as the training saw it, and a bundle can be restored
and exported again without further loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.errors import ItuneError

Float = NDArray[np.float32]

BLOCK_SIZES = {8: 64, 4: 32}
"""How many values of an output row share a scale, by the number of bits. Both divide every GPT-2 width."""
QMAX = 127  # symmetric: -128 is never used


def to_half(name: str, array: NDArray[Any], *, clip: bool = False) -> NDArray[np.float16]:
    """The weight `name` in half precision; `clip` limits values beyond its range.

    Raises:
        ItuneError: a value is beyond the range.
    """
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if np.isfinite(half).all():
        return half
    if not clip:
        raise ItuneError(f"weight {name} has values beyond 65504, too large for fp16: export int8 or fp32 instead")
    return half.clip(np.finfo(np.float16).min, np.finfo(np.float16).max)


def quantize_blockwise(weight: Float, bits: int = 8) -> tuple[NDArray[np.uint8], Float]:
    """Quantise weight [N, K] in blocks along K, the layout of ONNX Runtime's MatMulNBits.

    Returns codes uint8 [N, ceil(K / block), block * bits / 8] and scales [N, ceil(K / block)]. The zero point is
    2^(bits - 1), a last partial block is padded with the zero code, and a byte's lower half is the first of its two
    4-bit codes.
    """
    n, k = weight.shape
    block_size = BLOCK_SIZES[bits]
    blocks = -(-k // block_size)
    padded = np.zeros((n, blocks * block_size), np.float32)
    padded[:, :k] = weight
    padded = padded.reshape(n, blocks, block_size)
    if bits == 8:
        scales = _scales(np.abs(padded).max(axis=2), QMAX)
        codes = np.rint(padded / scales[..., None]).clip(-QMAX, QMAX)
        return (codes + 128).astype(np.uint8), scales
    # All 16 codes are used: the value of largest magnitude, of either sign, becomes -8 exactly.
    largest = np.take_along_axis(padded, np.abs(padded).argmax(axis=2)[..., None], axis=2)[..., 0]
    scales = _scales(largest, -8)
    nibbles = (np.rint(padded / scales[..., None]).clip(-8, 7) + 8).astype(np.uint8)
    pairs: NDArray[np.uint8] = nibbles[..., ::2] + 16 * nibbles[..., 1::2]
    return pairs, scales


def dequantize_blockwise(codes: NDArray[np.uint8], scales: Float, k: int, bits: int = 8) -> Float:
    """The inverse of `quantize_blockwise`: the weight [N, k]."""
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
    values = (codes.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    return np.ascontiguousarray(values.reshape(len(codes), -1)[:, :k])


def quantize_per_channel(weight: Float) -> tuple[NDArray[np.int8], Float]:
    """Quantise weight [N, ...] with one scale per output channel; returns int8 codes and scales [N]."""
    scales = _scales(np.abs(weight.reshape(len(weight), -1)).max(axis=1), QMAX)
    codes = np.rint(weight / _broadcast(scales, weight.ndim)).clip(-QMAX, QMAX)
    return codes.astype(np.int8), scales


def dequantize_per_channel(codes: NDArray[np.int8], scales: Float) -> Float:
    """The inverse of `quantize_per_channel`: the weight [N, ...]."""
    return codes.astype(np.float32) * _broadcast(scales, codes.ndim)


def snap_blockwise(weight: Float, bits: int = 8) -> Float:
    """The nearest weight [N, K] on the blockwise grid."""
    return dequantize_blockwise(*quantize_blockwise(weight, bits), weight.shape[1], bits)


def snap_per_channel(weight: Float) -> Float:
    """The nearest weight [N, ...] on the per-channel int8 grid."""
    return dequantize_per_channel(*quantize_per_channel(weight))


def _scales(largest: Float, code: int) -> Float:
    """Scales that turn the largest values into `code`; 1 for blocks of zeros."""
    scales = (largest / code).astype(np.float32)
    scales[scales == 0] = 1.0
    return scales


def _broadcast(scales: Float, ndim: int) -> Float:
    return scales.reshape(-1, *[1] * (ndim - 1))
