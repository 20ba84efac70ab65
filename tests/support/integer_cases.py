"""Matrices of every encoding that int8 activations are multiplied with, and that product by plain loops."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf_blocks import GGUF_BLOCKS, draw_blocks

from ktmoe_np.reference import (
    IntegerMatrix,
    decode_gguf,
    decode_gptq_int4,
    decode_int4_zp,
    decode_mxfp4,
    decode_nvfp4,
    decode_rawint4,
    gradient_weights,
    integers_of_gguf,
    integers_of_gptq_int4,
    integers_of_int4_zp,
    integers_of_mxfp4,
    integers_of_nvfp4,
    integers_of_quantized,
    integers_of_rawint4,
    quantize_int4,
    quantize_int8,
)

__all__ = ["ENCODINGS", "Encoded", "draw_encoded", "exact_fma", "product_loop", "round32"]

AnyArray = Any
bf16 = ml_dtypes.bfloat16


class Encoded(NamedTuple):
    """A matrix as integers, and what is known to be decoded from the same bytes."""

    matrix: IntegerMatrix
    decoded: Any  # bfloat16 [..., N, K], or a ScaledMatrix


def draw_encoded(rng: np.random.Generator, name: str, *shape: int) -> Encoded:
    """Any codes [..., N, K] of an encoding, with weights of about 1; K is rounded up to whole groups."""
    return ENCODINGS[name](rng, *shape)


def _up(count: int, size: int) -> int:
    return -(-count // size) * size


def _scales(rng: np.random.Generator, typical: float, *shape: int) -> AnyArray:
    return (rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape) / typical).astype(np.float32)


def _gguf(name: str, rng: np.random.Generator, *shape: int) -> Encoded:
    found = GGUF_BLOCKS[name]
    *lead, k = shape
    rows = draw_blocks(rng, name, _scales(rng, found.typical, *lead, -(-k // found.block)))
    rows = rows.reshape(*lead, -1)
    return Encoded(integers_of_gguf(rows, name), decode_gguf(rows, name))


def _rawint4(group_size: int, rng: np.random.Generator, *shape: int) -> Encoded:
    *lead, k = shape
    codes = rng.integers(0, 256, (*lead, -(-k // 2)), np.uint8)
    arguments = codes, _scales(rng, 4.6, *lead, -(-k // group_size)).astype(bf16), k
    size: Any = {"group_size": group_size}
    return Encoded(integers_of_rawint4(*arguments, **size), decode_rawint4(*arguments, **size))


def _gptq_int4(rng: np.random.Generator, *shape: int) -> Encoded:
    *lead, n, k = shape
    k = _up(k, 32)
    codes = rng.integers(-(2**31), 2**31, (*lead, k // 8, n), np.int32)
    group_size = int(rng.choice([32, 64, 128, k]))
    scale = _scales(rng, 4.6, *lead, -(-k // group_size), n).astype((np.float16, bf16)[rng.integers(2)])
    return Encoded(integers_of_gptq_int4(codes, scale), decode_gptq_int4(codes, scale))


def _int4_zp(size: int, rng: np.random.Generator, *shape: int) -> Encoded:
    """Of a layer with blocks of that size, which divides the groups."""
    *lead, k = shape
    k = _up(k, size)
    codes = rng.integers(0, 256, (*lead, k // 2), np.uint8)
    group_size = int(rng.choice([group for group in (32, 64, 128, k) if group % size == 0]))
    scale = _scales(rng, 6.5, *lead, -(-k // group_size)).astype((np.float16, bf16)[rng.integers(2)])
    zero = rng.integers(0, 17, scale.shape).astype(np.uint8)
    return Encoded(
        integers_of_int4_zp(codes, scale, zero, group_size=size), decode_int4_zp(codes, scale, zero)
    )


def _mxfp4(rng: np.random.Generator, *shape: int) -> Encoded:
    *lead, k = shape
    codes = rng.integers(0, 256, (*lead, -(-k // 2)), np.uint8)
    arguments = codes, rng.integers(124, 128, (*lead, -(-k // 32))).astype(np.uint8), k
    return Encoded(integers_of_mxfp4(*arguments), decode_mxfp4(*arguments))


def _nvfp4(rng: np.random.Generator, *shape: int) -> Encoded:
    *lead, _, k = shape
    codes = rng.integers(0, 256, (*shape[:-1], -(-k // 2)), np.uint8)
    scale = rng.integers(0x30, 0x50, (*shape[:-1], -(-k // 16))).astype(np.uint8)
    arguments = codes, scale, _scales(rng, 4.0, *lead), k
    return Encoded(integers_of_nvfp4(*arguments), decode_nvfp4(*arguments))


def _quantized(quantize: Callable[[AnyArray], Any], rng: np.random.Generator, *shape: int) -> Encoded:
    matrix = quantize(rng.standard_normal(shape, np.float32))
    return Encoded(integers_of_quantized(matrix), gradient_weights(matrix))


#: name -> what draws a matrix of it from a generator and a shape.
ENCODINGS: dict[str, Callable[..., Encoded]] = {
    **{f"GGUF {name}": partial(_gguf, name) for name in GGUF_BLOCKS},
    **{f"RAWINT4, {size}": partial(_rawint4, size) for size in (32, 64, 128)},
    "GPTQ_INT4": _gptq_int4,
    **{f"INT4_ZP, {size}": partial(_int4_zp, size) for size in (32, 64, 128)},
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "MOE_INT8": partial(_quantized, quantize_int8),
    "MOE_INT8, 32": partial(_quantized, partial(quantize_int8, group_size=32)),
    "MOE_INT4, 32": partial(_quantized, quantize_int4),
    "MOE_INT4, 128": partial(_quantized, partial(quantize_int4, group_size=128)),
}


# ---- the product in exact fractions ----


def round32(value: Fraction) -> np.float32:
    """The float32 nearest to a fraction, ties to even."""
    if value == 0:
        return np.float32(0)
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    step = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(value / step) * step
    if abs(rounded) >= 2**128:
        return np.float32(np.inf if value > 0 else -np.inf)
    return np.float32(float(rounded))


def exact_fma(a: Any, b: Any, c: Any) -> np.float32:
    """The float32 a * b + c of finite numbers, by fractions."""
    return round32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


def _blocks_of(x: list[float], size: int) -> tuple[list[int], list[np.float32]]:
    """Codes of a row of activations, and the scale of each block."""
    codes, scales = [], []
    for start in range(0, len(x), size):
        block = x[start : start + size]
        scale = np.float32(max(abs(v) for v in block)) / np.float32(127)
        scales.append(scale)
        for v in block:
            code = 0 if scale == 0 else round(float(np.float32(v) / scale))
            codes.append(max(-127, min(127, code)))
    return codes, scales


def product_loop(x: AnyArray, matrix: IntegerMatrix) -> AnyArray:
    """Multiply rows of finite activations [M, K] with a matrix [N, K], one number at a time."""
    num_rows, num_columns = matrix.shape
    size, group, per = matrix.activation_block, matrix.group_size, matrix.multiplier_size

    def whole(numbers: AnyArray, n: int, k: int) -> int:
        return 1 if numbers is None else int(numbers[n, k // per])

    result = np.zeros((len(x), num_rows), np.float32)
    for m, n in np.ndindex(result.shape):
        codes, scales = _blocks_of([float(v) for v in x[m]], size)
        acc, start = np.float32(0), 0
        while start < num_columns:
            end = min(start + size - start % size, start + group - start % group, num_columns)
            terms = [(k, codes[k], int(matrix.codes[n, k])) for k in range(start, end)]
            s = scales[start // size]
            total = sum(xq * whole(matrix.multiplier, n, k) * code for k, xq, code in terms)
            acc = exact_fma(matrix.scale[n, start // group] * s, round32(Fraction(total)), acc)
            if matrix.minimum is not None:
                total = sum(xq * whole(matrix.minimum_multiplier, n, k) for k, xq, _ in terms)
                acc = exact_fma(-(matrix.minimum[n, start // group] * s), round32(Fraction(total)), acc)
            start = end
        result[m, n] = acc if matrix.channel_scale is None else acc * matrix.channel_scale[n]
    return result
