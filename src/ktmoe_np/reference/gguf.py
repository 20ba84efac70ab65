"""The GGUF tensor types, decoded: blocks of 32 to 256 values with their scales among them.

A row is whole blocks; a value is scale * number + offset in float32, rounded to bfloat16. The layouts are
those of ggml, where the types come from. One function per type takes blocks [n, bytes] apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .activation import round_bf16
from .gguf_points import (
    POINTS_256,
    POINTS_512,
    POINTS_1024,
    QUAD_POINTS_256,
    QUAD_POINTS_512,
    TERNARY_POINTS,
)

__all__ = ["BLOCK_TYPES", "TYPES", "Blocks", "decode_gguf", "take_apart"]

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


class Blocks(NamedTuple):
    """Blocks taken apart: w = scale * multiplier * number - minimum * minimum_multiplier.

    The products are exact in float32. Multipliers are 1 and minima 0 where there are none.
    """

    numbers: Ints  #: [n, groups, values of a group]
    scale: Floats  #: [n, groups, 1]; of types with multipliers [n, 1, 1]
    multiplier: Ints | None = None  #: [n, groups, 1]
    minimum: Floats | None = None  #: like the scale
    minimum_multiplier: Ints | None = None  #: like the multiplier

    def values(self) -> Floats:
        """The weights, [n, groups, values of a group]."""
        scale = self.scale if self.multiplier is None else self.scale * self.multiplier.astype(np.float32)
        weights: Floats = scale * self.numbers.astype(np.float32)
        if self.minimum is None:
            return weights
        if self.minimum_multiplier is None:
            return weights - self.minimum
        return weights - self.minimum * self.minimum_multiplier.astype(np.float32)


#: Values of the nibbles of the non-linear types.
_NON_LINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int32)


def decode_gguf(data: Bytes, type_name: str) -> NDArray[Any]:
    """Decode rows of a GGUF tensor type: w = bf(scale * number + offset).

    Parameters
    ----------
    data : ndarray of uint8, [..., bytes of a row]
    type_name : str
        One of `TYPES`.

    Returns
    -------
    ndarray of bfloat16, [..., K]

    Raises
    ------
    ValueError
        Another type, or rows that are not whole blocks.

    Examples
    --------
    >>> import numpy as np
    >>> block = np.frombuffer(np.float16(0.5).tobytes() + bytes([0x19] * 16), np.uint8)
    >>> decode_gguf(block, "q4_0").reshape(2, 16)[:, 0].astype(float).tolist()
    [0.5, -3.5]
    """
    if type_name in _PLAIN:
        return _rounded(_PLAIN[type_name](np.ascontiguousarray(data)))
    blocks = take_apart(data, type_name)
    with np.errstate(invalid="ignore", over="ignore"):
        values = blocks.values()
    return _rounded(values.reshape(*data.shape[:-1], -1))


def take_apart(data: Bytes, type_name: str) -> Blocks:
    """Take the blocks of rows [..., bytes of a row] apart, in their order."""
    if type_name not in _BLOCKS:
        raise ValueError(f"type_name: got {type_name!r}, expected one of {', '.join(TYPES)}")
    block_bytes, of_blocks = _BLOCKS[type_name]
    if data.shape[-1] % block_bytes:
        raise ValueError(
            f"data: got rows of {data.shape[-1]} bytes, expected a multiple of {block_bytes} of {type_name}"
        )
    with np.errstate(invalid="ignore"):  # scales may be any NaN
        return of_blocks(np.ascontiguousarray(data).reshape(-1, block_bytes))


def _rounded(values: Floats) -> NDArray[Any]:
    return round_bf16(values).astype(ml_dtypes.bfloat16)


def _half(data: Bytes) -> Floats:
    """Float16 in two bytes [n, 2] as [n, 1, 1]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)[:, :, None]


def _column(per_group: NDArray[Any]) -> Ints:
    """Integers of groups [n, groups] as [n, groups, 1]."""
    return per_group.astype(np.int32)[:, :, None]


def _nibbles(data: Bytes) -> Ints:
    """The low nibbles of bytes [..., b], then the high ones: [..., 2 b]."""
    return np.concatenate([data & 15, data >> 4], axis=-1).astype(np.int32)


def _bits(data: Bytes, width: int) -> Ints:
    """Numbers of `width` bits, the lowest first, behind the bytes that they are in: [..., b, 8 / width]."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    return (data[..., None] >> shifts & ((1 << width) - 1)).astype(np.int32)


def _fives(high_bits: Bytes, nibbles: Bytes) -> Ints:
    return _nibbles(nibbles) | _bits(high_bits, 1).reshape(-1, 32) << 4


def _q4_0(b: Bytes) -> Blocks:
    return Blocks(_nibbles(b[:, None, 2:]) - 8, _half(b[:, :2]))


def _q4_1(b: Bytes) -> Blocks:
    return Blocks(_nibbles(b[:, None, 4:]), _half(b[:, :2]), minimum=-_half(b[:, 2:4]))


def _q5_0(b: Bytes) -> Blocks:
    return Blocks(_fives(b[:, 2:6], b[:, 6:])[:, None] - 16, _half(b[:, :2]))


def _q5_1(b: Bytes) -> Blocks:
    return Blocks(_fives(b[:, 4:8], b[:, 8:])[:, None], _half(b[:, :2]), minimum=-_half(b[:, 2:4]))


def _q8_0(b: Bytes) -> Blocks:
    return Blocks(b[:, None, 2:].view(np.int8).astype(np.int32), _half(b[:, :2]))


def _iq4_nl(b: Bytes) -> Blocks:
    return Blocks(_NON_LINEAR[_nibbles(b[:, None, 2:])], _half(b[:, :2]))


def _twos(data: Bytes) -> Ints:
    """64 bytes of 256 numbers of two bits, those of equal shift side by side: [n, 256]."""
    return _bits(data.reshape(-1, 2, 32), 2).swapaxes(2, 3).reshape(-1, 256)


def _q2_k(b: Bytes) -> Blocks:
    both = b[:, :16, None].astype(np.int32)
    numbers = _twos(b[:, 16:80]).reshape(-1, 16, 16)
    return Blocks(numbers, _half(b[:, 80:82]), both & 15, _half(b[:, 82:]), both >> 4)


def _q3_k(b: Bytes) -> Blocks:
    third = _bits(b[:, :32], 1).swapaxes(1, 2).reshape(-1, 256)
    numbers = (_twos(b[:, 32:96]) | third << 2) - 4
    low = _nibbles(b[:, 96:104])
    high = _bits(b[:, 104:108], 2).swapaxes(1, 2).reshape(-1, 16)
    return Blocks(numbers.reshape(-1, 16, 16), _half(b[:, 108:]), _column((low | high << 4) - 32))


def _with_eight_scales(numbers: Ints, b: Bytes) -> Blocks:
    """Q4_K and Q5_K: multipliers of six bits, four of them whole, four with separate upper bits."""
    first, second, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate([first & 63, rest & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], axis=1)
    return Blocks(numbers, _half(b[:, :2]), _column(scales), _half(b[:, 2:4]), _column(minima))


def _q4_k(b: Bytes) -> Blocks:
    return _with_eight_scales(_nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32), b)


def _q5_k(b: Bytes) -> Blocks:
    nibbles = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _with_eight_scales(nibbles | _bits(b[:, 16:48], 1).swapaxes(1, 2) << 4, b)


def _q6_k(b: Bytes) -> Blocks:
    nibbles = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    numbers = (nibbles | _twos(b[:, 128:192]) << 4) - 32
    scales = b[:, 192:208].view(np.int8)
    return Blocks(numbers.reshape(-1, 16, 16), _half(b[:, 208:]), _column(scales))


def _iq4_xs(b: Bytes) -> Blocks:
    low, high = _bits(b[:, 4:8], 4).reshape(-1, 8), _bits(b[:, 2:4], 2).reshape(-1, 8)
    numbers = _NON_LINEAR[_nibbles(b[:, 8:].reshape(-1, 8, 16))]
    return Blocks(numbers, _half(b[:, :2]), _column((low | high << 4) - 32))


def _words(data: Bytes, dtype: str) -> Ints:
    """Little-endian integers behind one another: [n, words]."""
    return np.ascontiguousarray(data).view(dtype).astype(np.int64)


def _odd(scales: Ints) -> Ints:
    """Multipliers 2 s + 1 of groups, [n, groups, 1]."""
    return _column(2 * scales + 1)


def _signed(sizes: Ints, signs: Ints) -> Ints:
    """Sizes [..., 8] with the signs of eight bits [...]."""
    signed: Ints = np.where(signs[..., None] >> np.arange(8) & 1, -sizes, sizes)
    return signed


def _eight_signs(seven: Ints) -> Ints:
    """Seven bits and an eighth that makes their number even."""
    parity: Ints = (seven[..., None] >> np.arange(7) & 1).sum(axis=-1) & 1
    return seven | parity << 7


#: Values of the coordinates of points.
_SIZES = np.array([8, 25, 43], np.int32)
_QUAD_SIZES = np.array([4, 12, 20, 28, 36, 44, 52, 62], np.int32)


def _iq2_xxs(b: Bytes) -> Blocks:
    words = _words(b[:, 2:], "<u4").reshape(-1, 8, 2)
    codes = b[:, 2:].reshape(-1, 8, 8)[:, :, :4]
    signs = _eight_signs(words[:, :, 1:] >> np.array([0, 7, 14, 21]) & 127)
    numbers = _signed(_SIZES[POINTS_256[codes]], signs).reshape(-1, 8, 32)
    return Blocks(numbers, _half(b[:, :2]) * np.float32(0.125), _odd(words[:, :, 1] >> 28))


def _iq2_xs(b: Bytes) -> Blocks:
    words = _words(b[:, 2:66], "<u2")
    numbers = _signed(_SIZES[POINTS_512[words & 511]], _eight_signs(words >> 9)).reshape(-1, 16, 16)
    return Blocks(numbers, _half(b[:, :2]) * np.float32(0.125), _odd(_bits(b[:, 66:], 4).reshape(-1, 16)))


def _iq2_s(b: Bytes) -> Blocks:
    codes = b[:, 2:34].astype(np.int32) | _bits(b[:, 66:74], 2).reshape(-1, 32) << 8
    numbers = _signed(_SIZES[POINTS_1024[codes]], b[:, 34:66].astype(np.int32)).reshape(-1, 16, 16)
    return Blocks(numbers, _half(b[:, :2]) * np.float32(0.125), _odd(_bits(b[:, 74:], 4).reshape(-1, 16)))


def _iq3_xxs(b: Bytes) -> Blocks:
    words = _words(b[:, 66:], "<u4")
    signs = _eight_signs(words[:, :, None] >> np.array([0, 7, 14, 21]) & 127)
    sizes = _QUAD_SIZES[QUAD_POINTS_256[b[:, 2:66]]].reshape(-1, 8, 4, 8)
    numbers = _signed(sizes, signs).reshape(-1, 8, 32)
    return Blocks(numbers, _half(b[:, :2]) * np.float32(0.25), _odd(words >> 28))


def _iq3_s(b: Bytes) -> Blocks:
    codes = b[:, 2:66].astype(np.int32) | _bits(b[:, 66:74], 1).reshape(-1, 64) << 8
    sizes = (2 * QUAD_POINTS_512[codes] + 1).reshape(-1, 32, 8)
    numbers = _signed(sizes, b[:, 74:106].astype(np.int32)).reshape(-1, 8, 32)
    return Blocks(numbers, _half(b[:, :2]), _odd(_bits(b[:, 106:], 4).reshape(-1, 8)))


def _shifted_eighths(codes: Ints, down: Ints) -> Ints:
    """Eight times numbers -1, 0 and 1 that are an eighth too large or, where `down`, too small."""
    return 8 * (TERNARY_POINTS[codes] - 1) + np.where(down, -1, 1)[..., None]


def _iq1_s(b: Bytes) -> Blocks:
    words = _words(b[:, 34:], "<u2")
    upper = (words[:, :, None] >> np.array([0, 3, 6, 9]) & 7).reshape(-1, 32)
    down = np.repeat(words >> 15, 4, axis=1)
    numbers = _shifted_eighths(b[:, 2:34].astype(np.int32) | upper << 8, down).reshape(-1, 8, 32)
    return Blocks(numbers, _half(b[:, :2]) * np.float32(0.125), _odd(words >> 12 & 7))


def _iq1_m(b: Bytes) -> Blocks:
    words = _words(b[:, 48:], "<u2")
    half = (words >> 12 << np.array([0, 4, 8, 12])).sum(axis=1).astype("<u2")
    scales = (words[:, :, None] >> np.array([0, 3, 6, 9]) & 7).reshape(-1, 16)
    upper = _bits(b[:, 32:48], 4).reshape(-1, 32)
    numbers = _shifted_eighths(b[:, :32].astype(np.int32) | (upper & 7) << 8, upper >> 3)
    scale = _half(half.view(np.uint8).reshape(-1, 2)) * np.float32(0.125)
    return Blocks(numbers.reshape(-1, 16, 16), scale, _odd(scales))


def _tq1_0(b: Bytes) -> Blocks:
    def digits(data: Bytes, count: int) -> Ints:
        """The digits of weight 81, 27, .. of all bytes, digit by digit."""
        rest = data[:, None, :].astype(np.int32) * (3 ** np.arange(count))[:, None] & 255
        return (rest * 3 >> 8).reshape(len(data), -1) - 1

    numbers = np.concatenate([digits(b[:, :32], 5), digits(b[:, 32:48], 5), digits(b[:, 48:52], 4)], axis=1)
    return Blocks(numbers[:, None], _half(b[:, 52:]))


def _tq2_0(b: Bytes) -> Blocks:
    return Blocks(_twos(b[:, :64])[:, None] - 1, _half(b[:, 64:]))


def _q1_0(b: Bytes) -> Blocks:
    return Blocks(2 * _bits(b[:, 2:], 1).reshape(-1, 1, 128) - 1, _half(b[:, :2]))


#: Twice the numbers of E2M1.
_E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int32)


def _mxfp4(b: Bytes) -> Blocks:
    scale = np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128)
    return Blocks(_E2M1_DOUBLED[_nibbles(b[:, None, 1:])], scale[:, :, None])


def _nvfp4(b: Bytes) -> Blocks:
    exponent, mantissa = b[:, :4].astype(np.int32) >> 3 & 15, b[:, :4].astype(np.int32) & 7
    scale = np.ldexp(np.where(exponent == 0, mantissa, 8 + mantissa), np.maximum(exponent, 1) - 11)
    scale = np.where(b[:, :4] == 127, 0, scale).astype(np.float32)
    return Blocks(_E2M1_DOUBLED[_nibbles(b[:, 4:].reshape(-1, 4, 8))], scale[:, :, None])


_PLAIN: dict[str, Callable[[Bytes], Floats]] = {
    "f32": lambda data: data.view("<f4"),
    "f16": lambda data: data.view("<f2").astype(np.float32),
    "bf16": lambda data: (data.view("<u2").astype(np.uint32) << 16).view(np.float32),
}

_BLOCKS: dict[str, tuple[int, Callable[[Bytes], Blocks]]] = {
    "q4_0": (18, _q4_0),
    "q4_1": (20, _q4_1),
    "q5_0": (22, _q5_0),
    "q5_1": (24, _q5_1),
    "q8_0": (34, _q8_0),
    "q2_k": (84, _q2_k),
    "q3_k": (110, _q3_k),
    "q4_k": (144, _q4_k),
    "q5_k": (176, _q5_k),
    "q6_k": (210, _q6_k),
    "iq4_nl": (18, _iq4_nl),
    "iq4_xs": (136, _iq4_xs),
    "iq2_xxs": (66, _iq2_xxs),
    "iq2_xs": (74, _iq2_xs),
    "iq2_s": (82, _iq2_s),
    "iq3_xxs": (98, _iq3_xxs),
    "iq3_s": (110, _iq3_s),
    "iq1_s": (50, _iq1_s),
    "iq1_m": (56, _iq1_m),
    "tq1_0": (54, _tq1_0),
    "tq2_0": (66, _tq2_0),
    "mxfp4": (17, _mxfp4),
    "nvfp4": (36, _nvfp4),
    "q1_0": (18, _q1_0),
}

#: The types of blocks, in small letters.
BLOCK_TYPES = tuple(_BLOCKS)

#: The types that are decoded.
TYPES = (*_PLAIN, *BLOCK_TYPES)
