"""The encodings of checkpoints, decoded: the weights of a layer that reads them in place.

Codes are bytes [..., N, row_bytes], as in the checkpoint; nibbles are two per byte, the low one first.
GPTQ alone packs columns of the transposed matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .activation import round_bf16
from .packing import unpack_nibbles
from .quantized import ScaledMatrix, spread

__all__ = [
    "DECODERS",
    "decode_fp8",
    "decode_fp8_perchannel",
    "decode_gptq_int4",
    "decode_int4_zp",
    "decode_mxfp4",
    "decode_mxfp8",
    "decode_nvfp4",
    "decode_rawint4",
]

Bytes = NDArray[np.uint8]


def decode_fp8(codes: Bytes, scale: NDArray[np.float32]) -> NDArray[Any]:
    """Decode E4M3 with a scale for every block of 128 rows by 128 columns: w = bf(x * scale).

    Parameters
    ----------
    codes : ndarray of uint8 or float8_e4m3fn, [..., N, K]
    scale : ndarray of float32, [..., ceil(N / 128), ceil(K / 128)]
        ``weight_scale_inv`` of DeepSeek's checkpoints.

    Returns
    -------
    ndarray of bfloat16, [..., N, K]

    Examples
    --------
    >>> import numpy as np
    >>> decode_fp8(np.uint8([[0x38, 0x41]]), np.float32([[0.5]])).astype(np.float32)
    array([[0.5  , 1.125]], dtype=float32)
    """
    num_rows = codes.shape[-2]
    rows = np.repeat(scale, 128, axis=-2)[..., :num_rows, :]
    return _scaled(e4m3(codes), rows, 128)


def decode_fp8_perchannel(codes: Bytes, scale: NDArray[np.float32]) -> ScaledMatrix:
    """Decode E4M3 with a scale for every row, which acts on sums: w = scale * x.

    Parameters
    ----------
    codes : ndarray of uint8 or float8_e4m3fn, [..., N, K]
    scale : ndarray of float32, [..., N] or [..., N, 1]

    Returns
    -------
    ScaledMatrix, [..., N, K]
    """
    values = e4m3(codes)
    return ScaledMatrix(values.astype(ml_dtypes.bfloat16), scale.reshape(values.shape[:-1]))


def decode_mxfp8(codes: Bytes, scale: Bytes) -> NDArray[Any]:
    """Decode E4M3 with a power of two, E8M0, for every 32 columns of a row: w = bf(x * scale).

    Parameters
    ----------
    codes : ndarray of uint8 or float8_e4m3fn, [..., N, K]
    scale : ndarray of uint8 or float8_e8m0fnu, [..., N, ceil(K / 32)]

    Returns
    -------
    ndarray of bfloat16, [..., N, K]
    """
    return _scaled(e4m3(codes), e8m0(scale), 32)


def decode_rawint4(
    codes: Bytes, scale: NDArray[Any], num_columns: int, *, group_size: int = 32
) -> NDArray[Any]:
    """Decode int4 as compressed-tensors packs it: a nibble is q + 8, w = bf(q * scale).

    Parameters
    ----------
    codes : ndarray of uint8, [..., N, ceil(K / 2)], or the same bytes as int32
    scale : ndarray of bfloat16, [..., N, ceil(K / group_size)]
    num_columns : int
        K.
    group_size : int
        Columns that share a scale.

    Returns
    -------
    ndarray of bfloat16, [..., N, K]

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> decode_rawint4(np.uint8([[0xF0]]), np.full((1, 1), 2, ml_dtypes.bfloat16), 2).astype(np.float32)
    array([[-16.,  14.]], dtype=float32)
    """
    numbers = nibbles(codes, num_columns).astype(np.float32) - 8
    return _scaled(numbers, scale.astype(np.float32), group_size)


def decode_gptq_int4(qweight: NDArray[np.int32], scales: NDArray[Any]) -> NDArray[Any]:
    """Decode int4 as GPTQ packs it, symmetric, in groups of neighbors: a nibble is q + 8, w = bf(q * scale).

    Parameters
    ----------
    qweight : ndarray of int32, [..., K / 8, N]
        Column 8 r + j of row n is in bits 4 j to 4 j + 3 of [r, n].
    scales : ndarray of float16 or bfloat16, [..., G, N]
        Column k of row n has scale [k // g, n], g being the power of two from 32 on of which K has G, the
        last one maybe in part; or K when G is 1.

    Returns
    -------
    ndarray of bfloat16, [..., N, K]

    Examples
    --------
    >>> import numpy as np
    >>> decode_gptq_int4(np.int32([[-1], [0], [0], [0]]), np.float16([[0.5]]))[:, 6:10].astype(np.float32)
    array([[ 3.5,  3.5, -4. , -4. ]], dtype=float32)
    """
    return _scaled(*gptq_numbers(qweight, scales))


def decode_int4_zp(codes: Bytes, scale: NDArray[Any], zero: Bytes) -> NDArray[Any]:
    """Decode int4 with zero points: w = bf((q - z) * scale).

    Parameters
    ----------
    codes : ndarray of uint8, [..., N, K / 2], or the same bytes as int32
        Nibbles q.
    scale : ndarray of float16 or bfloat16, [..., N, G]
        Groups are those of `decode_gptq_int4`.
    zero : ndarray of uint8, [..., N, G]

    Returns
    -------
    ndarray of bfloat16, [..., N, K]

    Examples
    --------
    >>> import numpy as np
    >>> decode_int4_zp(np.uint8([[0xF3]]), np.float16([[0.5]]), np.uint8([[5]])).astype(np.float32)
    array([[-1.,  5.]], dtype=float32)
    """
    return _scaled(*zero_point_numbers(codes, scale, zero))


def decode_mxfp4(codes: Bytes, scale: Bytes, num_columns: int) -> NDArray[Any]:
    """Decode E2M1 with a power of two, E8M0, for every 32 columns of a row: w = bf(x * scale).

    Parameters
    ----------
    codes : ndarray of uint8, [..., N, ceil(K / 2)]
    scale : ndarray of uint8 or float8_e8m0fnu, [..., N, ceil(K / 32)]
    num_columns : int
        K.

    Returns
    -------
    ndarray of bfloat16, [..., N, K]

    Examples
    --------
    >>> import numpy as np
    >>> decode_mxfp4(np.uint8([[0xF1]]), np.uint8([[128]]), 2).astype(np.float32)
    array([[  1., -12.]], dtype=float32)
    """
    return _scaled(e2m1(codes, num_columns), e8m0(scale), 32)


def decode_nvfp4(
    codes: Bytes, scale: Bytes, global_scale: NDArray[np.float32], num_columns: int
) -> ScaledMatrix:
    """Decode E2M1 with an E4M3 scale for every 16 columns of a row and one float32 for a matrix.

    Number times scale is exact in bfloat16; the matrix's scale acts on sums.

    Parameters
    ----------
    codes : ndarray of uint8, [..., N, ceil(K / 2)]
    scale : ndarray of uint8 or float8_e4m3fn, [..., N, ceil(K / 16)]
    global_scale : ndarray of float32, [...]
    num_columns : int
        K.

    Returns
    -------
    ScaledMatrix, [..., N, K]
    """
    values = _scaled(e2m1(codes, num_columns), e4m3(scale), 16)
    per_row = np.repeat(np.asarray(global_scale, np.float32)[..., None], values.shape[-2], axis=-1)
    return ScaledMatrix(values, per_row)


def zero_point_numbers(
    codes: NDArray[Any], scale: NDArray[Any], zero: Bytes
) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """Unpack int4 with zero points: q - z [..., N, K], scales [..., N, G], and the columns of a group."""
    num_columns = 2 * codes.view(np.uint8).shape[-1]
    group_size = _group_size(num_columns, scale.shape[-1])
    numbers = nibbles(codes, num_columns).astype(np.float32)
    numbers -= spread(zero, group_size, num_columns).astype(np.float32)
    return numbers, scale.astype(np.float32), group_size


def _group_size(num_columns: int, num_groups: int) -> int:
    """The power of two from 32 on of which so many columns have so many groups."""
    return next(size for size in map(int, 1 << np.arange(5, 31)) if num_columns <= size * num_groups)


def gptq_numbers(
    qweight: NDArray[np.int32], scales: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """Unpack GPTQ's int4: numbers [..., N, K], scales [..., N, G], and the columns of a group."""
    num_columns = 8 * qweight.shape[-2]
    group_size = _group_size(num_columns, scales.shape[-2])
    shifts = 4 * np.arange(8, dtype=np.int32)[:, None]
    fours = (qweight[..., None, :] >> shifts) & 15
    numbers = fours.reshape(*qweight.shape[:-2], num_columns, -1).astype(np.float32) - 8
    return numbers.swapaxes(-1, -2), scales.astype(np.float32).swapaxes(-1, -2), group_size


def e4m3(codes: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers of bytes of E4M3."""
    values: NDArray[np.float32] = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return values


def e8m0(scale: NDArray[Any]) -> NDArray[np.float32]:
    """Powers of two of bytes of E8M0."""
    values: NDArray[np.float32] = scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return values


def nibbles(codes: NDArray[Any], num_columns: int) -> Bytes:
    """Unpack bytes, of any dtype, to nibbles [..., K]."""
    return unpack_nibbles(np.ascontiguousarray(codes).view(np.uint8), num_columns)


def e2m1(codes: NDArray[Any], num_columns: int) -> NDArray[np.float32]:
    """Numbers of nibbles of E2M1, [..., K]."""
    codes = nibbles(codes, num_columns)
    values: NDArray[np.float32] = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return values


def _scaled(values: NDArray[np.float32], scale: NDArray[np.float32], group_size: int) -> NDArray[Any]:
    """Compute bf(value * scale), `scale` having a value for every `group_size` columns."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return round_bf16(values * spread(scale, group_size, values.shape[-1])).astype(ml_dtypes.bfloat16)


#: Method -> what decodes codes and scales [E, ..], and global scales [E] where it has some, of groups of so
#: many columns. K of codes that are two per byte is even: it is a multiple of a group.
DECODERS: Mapping[str, Callable[[NDArray[Any], NDArray[Any], Any, int], Any]] = {
    "FP8": lambda codes, scale, *_: decode_fp8(codes, scale),
    "FP8_PERCHANNEL": lambda codes, scale, *_: decode_fp8_perchannel(codes, scale),
    "MXFP8": lambda codes, scale, *_: decode_mxfp8(codes, scale),
    "RAWINT4": lambda codes, scale, _, group: decode_rawint4(
        codes, scale, 2 * codes.shape[-1], group_size=group
    ),
    "GPTQ_INT4": lambda codes, scale, *_: decode_gptq_int4(codes, scale),
    "INT4_ZP": lambda codes, scale, zero, _: decode_int4_zp(codes, scale, zero),
    "MXFP4": lambda codes, scale, *_: decode_mxfp4(codes, scale, 2 * codes.shape[-1]),
    "NVFP4": lambda codes, scale, factors, _: decode_nvfp4(codes, scale, factors, 2 * codes.shape[-1]),
}
