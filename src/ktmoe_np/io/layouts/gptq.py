"""The tensors of a matrix as GPTQ and AWQ write it, and which of their options are refused."""

from __future__ import annotations

import numpy as np

from ...formats.gptq import BLOCK_SIZE, first_not_float16, group_sizes
from ...formats.zero_points import ZeroPointMatrix, from_awq, from_gptq
from .encoding import AnyArray, Encoding, Shapes, Sizes, TensorSpec

__all__ = ["AWQ", "GPTQ_INT4", "GPTQ_ZERO_POINTS", "scale_problem"]

#: Eight nibbles of the zero that makes weights symmetric, 8: less one in the first version of the format.
_SYMMETRIC = (0x77777777, 0x88888888)


def _words(num_rows: int, num_columns: int) -> Shapes:
    """Eight of K in a number."""
    return ((num_columns // 8, num_rows),)


def _words_of_rows(num_rows: int, num_columns: int) -> Shapes:
    """Eight of N in a number."""
    return ((num_columns, num_rows // 8),)


def _scales(num_rows: int, num_columns: int) -> Shapes:
    """A row for each group, of any size that groups may have."""
    return tuple((count, num_rows) for count in group_sizes(num_columns))


def _zeros(num_rows: int, num_columns: int) -> Shapes:
    """As scales, eight of N in a number."""
    return tuple((count, num_rows // 8) for count in group_sizes(num_columns))


def _order(num_rows: int, num_columns: int) -> Shapes:
    return ((num_columns,),)


def scale_problem(array: AnyArray, sizes: Sizes) -> str | None:
    """The error of scales that are kept in float16."""
    unrepresentable = first_not_float16(array)
    return None if unrepresentable is None else f"got {unrepresentable:g}, expected numbers that float16 has"


def _groups_problem(array: AnyArray, sizes: Sizes) -> str | None:
    num_groups = sizes.scale[0]
    if len(array) == num_groups:
        return None
    return f"got {len(array)} groups, expected {num_groups} as of the scales"


def _zeros_problem(array: AnyArray, sizes: Sizes) -> str | None:
    words = array.view(np.uint32)
    if any((words == zero).all() for zero in _SYMMETRIC):
        return _groups_problem(array, sizes)
    return _groups_problem(array, sizes) or (
        "got zeros of weights that are not symmetric, expected 7 in every nibble, or 8 in every nibble "
        "(checkpoint_format gptq_v2); method INT4_ZP takes others"
    )


def _order_problem(array: AnyArray, sizes: Sizes) -> str | None:
    group_size = group_sizes(sizes.num_columns)[sizes.scale[0]]
    if np.array_equal(array, np.arange(sizes.num_columns) // group_size):
        return None
    return (
        f"got another order than groups of {group_size} neighbors, expected arange(K) // {group_size}: "
        "weights quantized with desc_act are not supported, since every matrix would read its inputs in an "
        "order of its own; quantize with desc_act=False"
    )


def _unpack_gptq(codes: AnyArray, scale: AnyArray, zeros: AnyArray | None, version: int) -> ZeroPointMatrix:
    """The first version of the format stores zero points less one."""
    assert zeros is not None
    return from_gptq(codes, scale, zeros, less=2 - version)


def _unpack_awq(codes: AnyArray, scale: AnyArray, zeros: AnyArray | None, version: int) -> ZeroPointMatrix:
    assert zeros is not None
    return from_awq(codes, scale, zeros)


_CODES = TensorSpec(".qweight", ("I32",), _words)
_SCALES = TensorSpec(".scales", ("F16", "BF16"), _scales, scale_problem)
_ORDER = TensorSpec(".g_idx", ("I32",), _order, _order_problem, optional=True)

#: GPTQ with 4 bits, symmetric and without desc_act, as AutoGPTQ, GPTQModel and their kin write it.
GPTQ_INT4 = Encoding(
    "GPTQ_INT4",
    _CODES,
    _SCALES,
    np.dtype(np.float16),
    values=8,
    group_size=BLOCK_SIZE,
    others=(TensorSpec(".qzeros", ("I32",), _zeros, _zeros_problem), _ORDER),
    transposed=True,
    symmetric=True,
)

#: The same with zero points of its own for each group, in the first version of the format stored less one.
GPTQ_ZERO_POINTS = Encoding(
    "INT4_ZP",
    _CODES,
    _SCALES,
    np.dtype(np.float16),
    values=8,
    group_size=BLOCK_SIZE,
    zeros=TensorSpec(".qzeros", ("I32",), _zeros, _groups_problem),
    others=(_ORDER,),
    transposed=True,
    symmetric=False,
    unpack=_unpack_gptq,
)

#: AWQ with 4 bits, version "GEMM".
AWQ = Encoding(
    "INT4_ZP",
    TensorSpec(".qweight", ("I32",), _words_of_rows),
    _SCALES,
    np.dtype(np.float16),
    group_size=BLOCK_SIZE,
    zeros=TensorSpec(".qzeros", ("I32",), _zeros, _groups_problem),
    transposed=True,
    packed_rows=8,
    unpack=_unpack_awq,
)
