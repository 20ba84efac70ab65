"""The tensors of a matrix as GPTQ writes it, and which of its options are refused."""

from __future__ import annotations

import numpy as np

from ...formats.gptq import BLOCK_SIZE, first_not_float16, group_sizes
from .encoding import AnyArray, Encoding, Shapes, Sizes, TensorSpec

__all__ = ["GPTQ_INT4"]

#: Eight nibbles of the zero that makes weights symmetric, 8: less one in the first version of the format.
_SYMMETRIC = (0x77777777, 0x88888888)


def _words(num_rows: int, num_columns: int) -> Shapes:
    """Eight of K in a number."""
    return ((num_columns // 8, num_rows),)


def _scales(num_rows: int, num_columns: int) -> Shapes:
    """A row for each group, of any size that groups may have."""
    return tuple((count, num_rows) for count in group_sizes(num_columns))


def _zeros(num_rows: int, num_columns: int) -> Shapes:
    """As scales, eight of N in a number."""
    return tuple((count, num_rows // 8) for count in group_sizes(num_columns))


def _order(num_rows: int, num_columns: int) -> Shapes:
    return ((num_columns,),)


def _scale_problem(array: AnyArray, sizes: Sizes) -> str | None:
    unrepresentable = first_not_float16(array)
    return None if unrepresentable is None else f"got {unrepresentable:g}, expected numbers that float16 has"


def _zeros_problem(array: AnyArray, sizes: Sizes) -> str | None:
    num_groups = sizes.scale[0]
    if len(array) != num_groups:
        return f"got {len(array)} groups, expected {num_groups} as of the scales"
    words = array.view(np.uint32)
    if any((words == zero).all() for zero in _SYMMETRIC):
        return None
    return (
        "got zeros of weights that are not symmetric, expected 7 in every nibble, or 8 in every nibble "
        "(checkpoint_format gptq_v2)"
    )


def _order_problem(array: AnyArray, sizes: Sizes) -> str | None:
    group_size = group_sizes(sizes.num_columns)[sizes.scale[0]]
    if np.array_equal(array, np.arange(sizes.num_columns) // group_size):
        return None
    return (
        f"got another order than groups of {group_size} neighbors, expected arange(K) // {group_size}: "
        "weights quantized with desc_act are not supported"
    )


#: GPTQ with 4 bits, symmetric and without desc_act, as AutoGPTQ, GPTQModel and their kin write it.
GPTQ_INT4 = Encoding(
    "GPTQ_INT4",
    TensorSpec(".qweight", ("I32",), _words),
    TensorSpec(".scales", ("F16", "BF16"), _scales, _scale_problem),
    np.dtype(np.float16),
    values=8,
    group_size=BLOCK_SIZE,
    others=(
        TensorSpec(".qzeros", ("I32",), _zeros, _zeros_problem),
        TensorSpec(".g_idx", ("I32",), _order, _order_problem, optional=True),
    ),
    transposed=True,
)
