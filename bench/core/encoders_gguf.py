"""The benched layer in GGUF blocks: nearest codes, scales from the largest value or from both ends.

Scales and offsets of groups within a block are numbers of a few bits, the block's largest being the largest
number. Nothing is searched for the least error, as those who make such files do.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .gguf_layer import layer_in_blocks
from .layer import Layer, to_float32

__all__ = ["GGUF_FORMATS", "GgufFormat"]

Array = NDArray[Any]

#: Numbers of the codes of the non-linear types, and the nearest code to each integer from -127 to 127.
_NON_LINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
_NEAREST = np.abs(np.arange(-127, 128)[:, None] - _NON_LINEAR).argmin(axis=1).astype(np.uint8)


@dataclass(frozen=True)
class GgufFormat:
    """A GGUF tensor type."""

    name: str
    block: int  #: weights of a block
    encode_blocks: Callable[[Array], tuple[Array, ...]]  #: float32 [n, block] to the fields, uint8 [n, bytes]
    tolerance: float  #: relative error from which on an answer is wrong

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return sum(field.shape[1] for field in self.encode_blocks(np.zeros((1, self.block), np.float32)))

    def encode(self, layer: Layer) -> dict[str, Any]:
        """Encode a layer to what it is loaded from, a projection in one array as in a file.

        Raises
        ------
        ValueError
            Rows are not whole blocks.
        """
        return layer_in_blocks(layer, self.name, self.block, self.block_bytes, self._write)

    def _write(self, projection: str, weights: Array, rows: Array) -> None:
        with ThreadPoolExecutor() as threads:
            list(threads.map(self._encode_matrix, weights, rows))

    def _encode_matrix(self, weights: Array, rows: Array) -> None:
        fields = self.encode_blocks(to_float32(weights).reshape(-1, self.block))
        np.concatenate(fields, axis=1, out=rows.reshape(-1, self.block_bytes))


def _half(values: Array) -> tuple[Array, Array]:
    """Numbers [n] as float16: their bytes [n, 2], and what they are now."""
    halves = values.astype("<f2")
    return halves[:, None].view(np.uint8), halves.astype(np.float32)


def _planes(codes: Array, width: int) -> Array:
    """Codes [n, ..., planes, k] in bytes [n, k * ...]: each plane `width` bits above the one before."""
    planes = np.moveaxis(codes, -2, 0)
    packed = planes[0].copy()
    for i in range(1, len(planes)):
        packed |= planes[i] << np.uint8(width * i)
    rows: Array = packed.reshape(len(codes), -1)
    return rows


def _twos(codes: Array) -> Array:
    """256 codes of two bits in 64 bytes."""
    return _planes(codes.reshape(-1, 2, 4, 32), 2)


def _extreme(groups: Array) -> Array:
    """The value of each group that is farthest from 0, with its sign."""
    high, low = groups.max(axis=-1), groups.min(axis=-1)
    farthest: Array = np.where(high > -low, high, low)
    return farthest


def _divided(values: Array, scale: Array) -> Array:
    """Values by their scale, where that is not 0."""
    quotient: Array = values / np.where(scale == 0, np.float32(1), scale)
    return quotient


def _nearest(values: Array, scale: Array, lowest: int, highest: int) -> Array:
    """Nearest multiples of a scale, as codes from 0 on."""
    numbers = _divided(values, scale)
    np.rint(numbers, out=numbers)
    np.clip(numbers, lowest, highest, out=numbers)
    numbers -= np.float32(lowest)
    return numbers.astype(np.uint8)


def _nearest_non_linear(values: Array, scale: Array) -> Array:
    numbers = np.clip(np.rint(_divided(values, scale)), -127, 127)
    codes: Array = _NEAREST[numbers.astype(np.int16) + 127]
    return codes


def _q4_0(blocks: Array) -> tuple[Array, ...]:
    scale, d = _half(_extreme(blocks) / np.float32(-8))
    return scale, _planes(_nearest(blocks, d[:, None], -8, 7).reshape(-1, 2, 16), 4)


def _both_ends(blocks: Array, highest: int) -> tuple[Array, Array, Array]:
    """Scale and least value in float16, and codes up to `highest` from there."""
    low = blocks.min(axis=1)
    scale, d = _half((blocks.max(axis=1) - low) / np.float32(highest))
    least, m = _half(low)
    return scale, least, _nearest(blocks - m[:, None], d[:, None], 0, highest)


def _q4_1(blocks: Array) -> tuple[Array, ...]:
    scale, least, codes = _both_ends(blocks, 15)
    return scale, least, _planes(codes.reshape(-1, 2, 16), 4)


def _five_bits(codes: Array) -> tuple[Array, Array]:
    """32 codes of five bits: the fifth ones in 4 bytes, the nibbles in 16."""
    fifth = np.packbits(codes >> 4, axis=1, bitorder="little")
    return fifth, _planes((codes & 15).reshape(-1, 2, 16), 4)


def _q5_1(blocks: Array) -> tuple[Array, ...]:
    scale, least, codes = _both_ends(blocks, 31)
    return scale, least, *_five_bits(codes)


def _f16(blocks: Array) -> tuple[Array, ...]:
    return (blocks.astype("<f2").view(np.uint8),)


def _bf16(blocks: Array) -> tuple[Array, ...]:
    return (blocks.astype(ml_dtypes.bfloat16).view(np.uint8),)


def _f32(blocks: Array) -> tuple[Array, ...]:
    return (blocks.view(np.uint8),)


def _q5_0(blocks: Array) -> tuple[Array, ...]:
    scale, d = _half(_extreme(blocks) / np.float32(-16))
    return scale, *_five_bits(_nearest(blocks, d[:, None], -16, 15))


def _q8_0(blocks: Array) -> tuple[Array, ...]:
    scale, d = _half(np.abs(blocks).max(axis=1) / np.float32(127))
    return scale, _nearest(blocks, d[:, None], -127, 127) - np.uint8(127)


def _iq4_nl(blocks: Array) -> tuple[Array, ...]:
    scale, d = _half(_extreme(blocks) / np.float32(-127))
    return scale, _planes(_nearest_non_linear(blocks, d[:, None]).reshape(-1, 2, 16), 4)


def _signed_scales(scales: Array, largest: int) -> tuple[Array, Array, Array]:
    """Scales [n, groups] as numbers up to `largest` and a float16 of a block.

    Gives bytes of the float16, the numbers, int8, and what the scales are now.
    """
    half, d = _half(np.abs(scales).max(axis=1) / np.float32(largest))
    numbers = np.clip(np.rint(_divided(scales, d[:, None])), -largest, largest)
    return half, numbers.astype(np.int8), d[:, None] * numbers


def _scales_and_minima(groups: Array, most: int, largest: int) -> tuple[Array, ...]:
    """From [n, groups, k]: codes 0 to `most` of the range of each group, 0 always within.

    Gives bytes of two float16, the numbers of scales and minima up to `largest`, and the codes, all uint8.
    """
    low = np.minimum(groups.min(axis=2), np.float32(0))
    step = (groups.max(axis=2) - low) / np.float32(most)
    half, d = _half(step.max(axis=1) / np.float32(largest))
    half_min, d_min = _half(-low.min(axis=1) / np.float32(largest))
    scales = _nearest(step, d[:, None], 0, largest)
    minima = _nearest(-low, d_min[:, None], 0, largest)
    offset = d_min[:, None] * minima
    codes = _nearest(groups + offset[:, :, None], (d[:, None] * scales)[:, :, None], 0, most)
    return half, half_min, scales, minima, codes


def _q2_k(blocks: Array) -> tuple[Array, ...]:
    groups = blocks.reshape(-1, 16, 16)
    half, half_min, scales, minima, codes = _scales_and_minima(groups, 3, 15)
    return scales | minima << np.uint8(4), _twos(codes), half, half_min


def _q3_k(blocks: Array) -> tuple[Array, ...]:
    groups = blocks.reshape(-1, 16, 16)
    half, numbers, scales = _signed_scales(_extreme(groups) / np.float32(-4), 31)
    codes = _nearest(groups, scales[:, :, None], -4, 3)
    sixes = (numbers + np.int8(32)).view(np.uint8)
    packed = _planes((sixes & 15).reshape(-1, 2, 8), 4), _planes((sixes >> 4).reshape(-1, 4, 4), 2)
    return _planes((codes >> 2).reshape(-1, 8, 32), 1), _twos(codes & 3), *packed, half


def _eight_scales(scales: Array, minima: Array) -> Array:
    """Twice eight numbers of six bits in 12 bytes: four whole ones, four with separate upper bits."""
    upper = [numbers[:, :4] | numbers[:, 4:] >> 4 << 6 for numbers in (scales, minima)]
    return np.concatenate([*upper, scales[:, 4:] & 15 | minima[:, 4:] << 4], axis=1)


def _q4_k(blocks: Array) -> tuple[Array, ...]:
    half, half_min, scales, minima, codes = _scales_and_minima(blocks.reshape(-1, 8, 32), 15, 63)
    return half, half_min, _eight_scales(scales, minima), _planes(codes.reshape(-1, 4, 2, 32), 4)


def _q5_k(blocks: Array) -> tuple[Array, ...]:
    half, half_min, scales, minima, codes = _scales_and_minima(blocks.reshape(-1, 8, 32), 31, 63)
    fifth, nibbles = _planes(codes >> 4, 1), _planes((codes & 15).reshape(-1, 4, 2, 32), 4)
    return half, half_min, _eight_scales(scales, minima), fifth, nibbles


def _q6_k(blocks: Array) -> tuple[Array, ...]:
    groups = blocks.reshape(-1, 16, 16)
    half, numbers, scales = _signed_scales(_extreme(groups) / np.float32(-32), 127)
    codes = _nearest(groups, scales[:, :, None], -32, 31)
    return _planes((codes & 15).reshape(-1, 2, 2, 64), 4), _twos(codes >> 4), numbers.view(np.uint8), half


def _iq4_xs(blocks: Array) -> tuple[Array, ...]:
    groups = blocks.reshape(-1, 8, 32)
    half, numbers, scales = _signed_scales(_extreme(groups) / np.float32(-127), 31)
    codes = _nearest_non_linear(groups, scales[:, :, None])
    sixes = (numbers + np.int8(32)).view(np.uint8)
    low = _planes((sixes & 15).reshape(-1, 4, 2).swapaxes(1, 2), 4)
    high = _planes((sixes >> 4).reshape(-1, 2, 4).swapaxes(1, 2), 2)
    return half, high, low, _planes(codes.reshape(-1, 8, 2, 16), 4)


#: By name.
GGUF_FORMATS = {
    name: GgufFormat(name, block, encode_blocks, tolerance)
    for name, block, encode_blocks, tolerance in (
        ("F32", 32, _f32, 0.02),
        ("F16", 32, _f16, 0.02),
        ("BF16", 32, _bf16, 0.02),
        ("Q4_0", 32, _q4_0, 0.25),
        ("Q4_1", 32, _q4_1, 0.2),
        ("Q5_0", 32, _q5_0, 0.12),
        ("Q5_1", 32, _q5_1, 0.1),
        ("Q8_0", 32, _q8_0, 0.03),
        ("Q2_K", 256, _q2_k, 0.8),
        ("Q3_K", 256, _q3_k, 0.45),
        ("Q4_K", 256, _q4_k, 0.2),
        ("Q5_K", 256, _q5_k, 0.1),
        ("Q6_K", 256, _q6_k, 0.06),
        ("IQ4_NL", 32, _iq4_nl, 0.2),
        ("IQ4_XS", 256, _iq4_xs, 0.2),
    )
}
