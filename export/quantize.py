"""Symmetric int8 weights, in the two layouts that the graphs use.

Both quantisers are idempotent: quantising a dequantised weight gives the same integers again, so a backbone
that was snapped to the int8 grid before the adapters were trained ships exactly as it was trained against,
and a shipped int8 bundle can be restored and exported again without a further loss.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

BLOCK_SIZE = 64  # values of one output row that share a scale; divides every GPT-2 width
QMAX = 127  # symmetric: -128 is never used


def quantize_blockwise(weight: Float, block_size: int = BLOCK_SIZE) -> tuple[NDArray[np.uint8], Float]:
    """Quantise weight [N, K] in blocks along K, the layout of ONNX Runtime's MatMulNBits with 8 bits.

    Returns (codes uint8 [N, ceil(K / block), block] with zero point 128, scales [N, ceil(K / block)]); a last
    partial block is padded with the zero code.
    """
    n, k = weight.shape
    blocks = -(-k // block_size)
    padded = np.zeros((n, blocks * block_size), np.float32)
    padded[:, :k] = weight
    padded = padded.reshape(n, blocks, block_size)
    scales = _scales(np.abs(padded).max(axis=2))
    codes = np.rint(padded / scales[..., None]).clip(-QMAX, QMAX)
    return (codes + 128).astype(np.uint8), scales


def dequantize_blockwise(codes: NDArray[np.uint8], scales: Float, k: int) -> Float:
    """The weight [N, k] that `quantize_blockwise` stands for."""
    values = (codes.astype(np.float32) - 128) * scales[..., None]
    return np.ascontiguousarray(values.reshape(len(codes), -1)[:, :k])


def quantize_per_channel(weight: Float) -> tuple[NDArray[np.int8], Float]:
    """Quantise weight [N, ...] with one scale per output channel N (convolutions); returns (int8, scales [N])."""
    scales = _scales(np.abs(weight.reshape(len(weight), -1)).max(axis=1))
    codes = np.rint(weight / _broadcast(scales, weight.ndim)).clip(-QMAX, QMAX)
    return codes.astype(np.int8), scales


def dequantize_per_channel(codes: NDArray[np.int8], scales: Float) -> Float:
    """The weight [N, ...] that `quantize_per_channel` stands for."""
    return codes.astype(np.float32) * _broadcast(scales, codes.ndim)


def snap_blockwise(weight: Float, block_size: int = BLOCK_SIZE) -> Float:
    """The nearest weight [N, K] on the block-wise int8 grid."""
    codes, scales = quantize_blockwise(weight, block_size)
    return dequantize_blockwise(codes, scales, weight.shape[1])


def snap_per_channel(weight: Float) -> Float:
    """The nearest weight [N, ...] on the per-channel int8 grid."""
    return dequantize_per_channel(*quantize_per_channel(weight))


def _scales(peak: Float) -> Float:
    scales = (peak / QMAX).astype(np.float32)
    scales[scales == 0] = 1.0
    return scales


def _broadcast(scales: Float, ndim: int) -> Float:
    return scales.reshape(-1, *[1] * (ndim - 1))
