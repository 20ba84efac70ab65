"""Quantized weights by the reference: what the command compares with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats.quantized import QuantizedFormat
from ..reference import QuantizedMatrix, dequantize, quantize_int4, quantize_int8, unpack_int4, unpack_int8

__all__ = ["dequantize_rows", "quantize_matrices", "unpack_rows"]


def unpack_rows(
    fmt: QuantizedFormat,
    codes: NDArray[np.uint8],
    channel_scale: NDArray[np.float32] | None,
    num_columns: int,
) -> QuantizedMatrix:
    """Unpack rows [..., N, row_bytes] and their scales [..., N], where the format has some."""
    if fmt.group_size is None:
        assert channel_scale is not None
        return unpack_int8(codes, channel_scale, num_columns)
    if fmt.bits == 8:
        return unpack_int8(codes, None, num_columns, group_size=fmt.group_size)
    assert channel_scale is not None
    return unpack_int4(codes, channel_scale, num_columns, group_size=fmt.group_size)


def dequantize_rows(
    fmt: QuantizedFormat,
    codes: NDArray[np.uint8],
    channel_scale: NDArray[np.float32] | None,
    num_columns: int,
) -> NDArray[np.float32]:
    """Compute the weights [..., N, K] of rows and their scales.

    Examples
    --------
    >>> from ktmoe_np.formats.quantized import FORMATS
    >>> codes, channel_scale = np.array([[1, 2, 255]], np.uint8), np.array([0.5], np.float32)
    >>> dequantize_rows(FORMATS["int8"], codes, channel_scale, 3)
    array([[ 0.5,  1. , -0.5]], dtype=float32)
    """
    weights: NDArray[np.float32] = dequantize(unpack_rows(fmt, codes, channel_scale, num_columns))
    return weights


def quantize_matrices(fmt: QuantizedFormat, weights: NDArray[Any]) -> QuantizedMatrix:
    """Quantize matrices [..., N, K]. Slow: the reference searches row by row."""
    if fmt.bits == 4:
        assert fmt.group_size is not None
        return quantize_int4(weights, group_size=fmt.group_size)
    if fmt.group_size is None:
        return quantize_int8(weights)
    return quantize_int8(weights, group_size=fmt.group_size)
