"""Encodings of checkpoints, and quantized matrices, as integers that int8 activations are multiplied with.

Codes and scales are those that `native` and `gguf` decode; E2M1 numbers are doubled and their scales halved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .gguf import BLOCK_TYPES, take_apart
from .integer_matrix import IntegerMatrix
from .native import e2m1, e4m3, e8m0, gptq_numbers, nibbles, zero_point_numbers
from .quantized import Int4Matrix, Int8GroupMatrix, Int8Matrix, num_groups, spread

__all__ = [
    "INTEGERS",
    "integers_of_gguf",
    "integers_of_gptq_int4",
    "integers_of_int4_zp",
    "integers_of_mxfp4",
    "integers_of_nvfp4",
    "integers_of_quantized",
    "integers_of_rawint4",
]

Bytes = NDArray[np.uint8]


def integers_of_gguf(data: Bytes, type_name: str, num_columns: int | None = None) -> IntegerMatrix:
    """Take rows of a GGUF tensor type of blocks apart.

    Types with blocks of 256 values have one scale and one minimum for a block, whose integer multipliers are
    part of the sums, and activations in blocks of 256. The others have a scale for each group, and 128.

    Parameters
    ----------
    data : ndarray of uint8, [..., N, bytes of a row]
    type_name : str
        One of `BLOCK_TYPES`.
    num_columns : int, optional
        K, when the last block is not to be used whole.

    Returns
    -------
    IntegerMatrix, [..., N, K]

    Raises
    ------
    ValueError
        Another type, rows that are not whole blocks, or another number of columns.

    Examples
    --------
    >>> import numpy as np
    >>> block = np.frombuffer(np.float16(0.5).tobytes() + bytes([0x19] * 16), np.uint8)
    >>> matrix = integers_of_gguf(block[None], "q4_0")
    >>> matrix.scale, matrix.codes[:, ::16]
    (array([[0.5]], dtype=float32), array([[ 1, -7]], dtype=int8))
    """
    if type_name not in BLOCK_TYPES:
        raise ValueError(f"type_name: got {type_name!r}, expected one of {', '.join(BLOCK_TYPES)}")
    blocks = take_apart(data, type_name)
    _, groups, group_values = blocks.numbers.shape
    block_values, lead = groups * group_values, data.shape[:-1]
    codes = _codes(blocks.numbers).reshape(*lead, -1)
    count = codes.shape[-1] if num_columns is None else num_columns
    if not codes.shape[-1] - block_values < count <= codes.shape[-1]:
        raise ValueError(
            f"num_columns: got {count}, expected one that {codes.shape[-1]} values in blocks hold"
        )
    scale_size = block_values // blocks.scale.shape[1]

    def per_row(values: NDArray[Any] | None, size: int, dtype: type) -> Any:
        """Numbers of groups of so many values by row, as many as there are columns for."""
        if values is None:
            return None
        return values.astype(dtype).reshape(*lead, -1)[..., : num_groups(count, size)]

    return IntegerMatrix(
        codes[..., :count],
        per_row(blocks.scale, scale_size, np.float32),
        scale_size,
        per_row(blocks.multiplier, group_values, np.int8),
        per_row(blocks.minimum, scale_size, np.float32),
        per_row(blocks.minimum_multiplier, group_values, np.int8),
        group_values,
        activation_block=256 if block_values == 256 else 128,
    )


def integers_of_rawint4(
    codes: Bytes, scale: NDArray[Any], num_columns: int, *, group_size: int = 32
) -> IntegerMatrix:
    """Take int4 as compressed-tensors packs it apart; see `decode_rawint4`.

    Parameters
    ----------
    codes : ndarray of uint8, [..., N, ceil(K / 2)], or the same bytes as int32
    scale : ndarray of bfloat16, [..., N, ceil(K / group_size)]
    num_columns : int
        K.
    group_size : int

    Returns
    -------
    IntegerMatrix, [..., N, K]

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> integers_of_rawint4(np.uint8([[0xF0]]), np.full((1, 1), 2, ml_dtypes.bfloat16), 2).codes
    array([[-8,  7]], dtype=int8)
    """
    numbers = nibbles(codes, num_columns).astype(np.int8) - np.int8(8)
    return IntegerMatrix(numbers, scale.astype(np.float32), group_size)


def integers_of_gptq_int4(qweight: NDArray[np.int32], scales: NDArray[Any]) -> IntegerMatrix:
    """Take int4 as GPTQ packs it apart; see `decode_gptq_int4`.

    Parameters
    ----------
    qweight : ndarray of int32, [..., K / 8, N]
    scales : ndarray of float16 or bfloat16, [..., G, N]

    Returns
    -------
    IntegerMatrix, [..., N, K]
        In groups of 32 columns, as Q4_0 has them, whatever the groups were.

    Examples
    --------
    >>> import numpy as np
    >>> matrix = integers_of_gptq_int4(np.int32([[-1], [0], [0], [0]]), np.float16([[0.5]]))
    >>> matrix.codes[:, 6:10], matrix.scale
    (array([[ 7,  7, -8, -8]], dtype=int8), array([[0.5]], dtype=float32))
    """
    numbers, scale, group_size = gptq_numbers(qweight, scales)
    num_columns = numbers.shape[-1]
    return IntegerMatrix(_codes(numbers), spread(scale, group_size, num_columns)[..., ::32], 32)


def integers_of_int4_zp(
    codes: Bytes, scale: NDArray[Any], zero: Bytes, *, group_size: int = 32
) -> IntegerMatrix:
    """Take int4 with zero points apart: q - z and its scale; see `decode_int4_zp`.

    Parameters
    ----------
    codes : ndarray of uint8, [..., N, K / 2]
    scale : ndarray of float16 or bfloat16, [..., N, G]
    zero : ndarray of uint8, [..., N, G]
    group_size : int
        That of the layer, 32, 64 or 128: sums are of so many columns.

    Returns
    -------
    IntegerMatrix, [..., N, K]

    Examples
    --------
    >>> import numpy as np
    >>> matrix = integers_of_int4_zp(np.full((1, 16), 0xF3, np.uint8), np.float16([[2]]), np.uint8([[5]]))
    >>> matrix.codes[:, :2], matrix.scale
    (array([[-2, 10]], dtype=int8), array([[2.]], dtype=float32))
    """
    numbers, per_group, size = zero_point_numbers(codes, scale, zero)
    per_block = spread(per_group, size, numbers.shape[-1])[..., ::group_size]
    return IntegerMatrix(_codes(numbers), per_block, group_size)


def integers_of_mxfp4(codes: Bytes, scale: Bytes, num_columns: int) -> IntegerMatrix:
    """Take E2M1 with E8M0 scales apart; see `decode_mxfp4`.

    Parameters
    ----------
    codes : ndarray of uint8, [..., N, ceil(K / 2)]
    scale : ndarray of uint8 or float8_e8m0fnu, [..., N, ceil(K / 32)]
    num_columns : int
        K.

    Returns
    -------
    IntegerMatrix, [..., N, K]

    Examples
    --------
    >>> import numpy as np
    >>> matrix = integers_of_mxfp4(np.uint8([[0xF1]]), np.uint8([[128]]), 2)
    >>> matrix.codes, matrix.scale
    (array([[  1, -12]], dtype=int8), array([[1.]], dtype=float32))
    """
    return IntegerMatrix(_codes(2 * e2m1(codes, num_columns)), _halved(e8m0(scale)), 32)


def integers_of_nvfp4(
    codes: Bytes, scale: Bytes, global_scale: NDArray[np.float32], num_columns: int
) -> IntegerMatrix:
    """Take E2M1 with E4M3 scales apart; see `decode_nvfp4`.

    Parameters
    ----------
    codes : ndarray of uint8, [..., N, ceil(K / 2)]
    scale : ndarray of uint8 or float8_e4m3fn, [..., N, ceil(K / 16)]
    global_scale : ndarray of float32, [...]
        Acts on sums.
    num_columns : int
        K.

    Returns
    -------
    IntegerMatrix, [..., N, K]

    Examples
    --------
    >>> import numpy as np
    >>> matrix = integers_of_nvfp4(np.uint8([[0xF1]]), np.uint8([[0x38]]), np.float32(3), 2)
    >>> matrix.codes, matrix.scale, matrix.channel_scale
    (array([[  1, -12]], dtype=int8), array([[0.5]], dtype=float32), array([3.], dtype=float32))
    """
    numbers = _codes(2 * e2m1(codes, num_columns))
    per_row = np.repeat(np.asarray(global_scale, np.float32)[..., None], numbers.shape[-2], axis=-1)
    return IntegerMatrix(numbers, _halved(e4m3(scale)), 16, channel_scale=per_row)


def integers_of_quantized(matrix: Int8Matrix | Int8GroupMatrix | Int4Matrix) -> IntegerMatrix:
    """Take a quantized matrix apart: its codes, m * q of an Int4Matrix, and the scales as those of groups.

    Parameters
    ----------
    matrix : Int8Matrix, Int8GroupMatrix or Int4Matrix, [..., N, K]

    Returns
    -------
    IntegerMatrix, [..., N, K]
        A channel scale is that of one group, the whole row.

    Examples
    --------
    >>> import numpy as np
    >>> integers_of_quantized(Int8Matrix(np.int8([[3, -2]]), np.float32([0.5]))).scale
    array([[0.5]], dtype=float32)
    """
    if isinstance(matrix, Int8GroupMatrix):
        return IntegerMatrix(matrix.codes, matrix.group_scale, matrix.group_size)
    num_columns = matrix.shape[-1]
    scale = matrix.channel_scale[..., None][..., :num_columns]  # a row without columns has no group
    return IntegerMatrix(matrix.codes, scale, max(1, num_columns))


def _codes(numbers: NDArray[Any]) -> NDArray[np.int8]:
    """Whole numbers as int8, which holds them all."""
    return numbers.astype(np.int8)


def _halved(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Half of scales, which is exact."""
    halves: NDArray[np.float32] = scale * np.float32(0.5)
    return halves


#: Method -> what takes codes and scales [E, ..] apart; arguments as of `native.DECODERS`.
INTEGERS: Mapping[str, Callable[[NDArray[Any], NDArray[Any], Any, int], IntegerMatrix]] = {
    "RAWINT4": lambda codes, scale, _, group: integers_of_rawint4(
        codes, scale, 2 * codes.shape[-1], group_size=group
    ),
    "GPTQ_INT4": lambda codes, scale, *_: integers_of_gptq_int4(codes, scale),
    "INT4_ZP": lambda codes, scale, zero, group: integers_of_int4_zp(codes, scale, zero, group_size=group),
    "MXFP4": lambda codes, scale, *_: integers_of_mxfp4(codes, scale, 2 * codes.shape[-1]),
    "NVFP4": lambda codes, scale, factors, _: integers_of_nvfp4(codes, scale, factors, 2 * codes.shape[-1]),
}
