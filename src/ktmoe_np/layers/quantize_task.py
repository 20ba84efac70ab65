"""Quantizing the matrices of a projection, one expert at a time, on the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import kt_kernel_ext as ext
from ..arrays.checks import Array, as_numpy, bfloat16
from ..arrays.spec import ArraySpec
from ..formats.methods import methods_that_take
from ..formats.quantized import QuantizedFormat
from ..formats.weights import Projection
from ..io.mapped import MappedFiles

__all__ = ["quantize_projection"]

_DTYPES = (bfloat16, np.dtype(np.float32), np.dtype(np.float16))


def quantize_projection(
    engine: ext.CPUInfer,
    fmt: QuantizedFormat,
    name: str,
    source: Any,
    shape: tuple[int, int, int],
    done: Callable[[], object] = lambda: None,
) -> Projection:
    """Quantize the matrices of a projection.

    They are read in place; what NumPy or the engine cannot read so (float16 too) is copied, one matrix at a
    time.

    Parameters
    ----------
    engine : ext.CPUInfer
        Whose threads share each matrix.
    fmt : QuantizedFormat
    name : str
        What messages call the projection.
    source : array of bfloat16, float32 or float16 [E, N, K], or E arrays [N, K]
    shape : tuple of int
        E, N and K.
    done : callable, optional
        Called after each matrix.

    Raises
    ------
    TypeError
        Not arrays, or another dtype.
    ValueError
        Another shape or number of arrays; a weight that is not finite: names expert and row.
    OSError
        A file of the matrices was truncated.
    """
    num_experts, num_rows, num_columns = shape
    _check_number(name, source, shape)
    codes = np.empty((num_experts, num_rows, fmt.row_bytes(num_columns)), np.uint8)
    scale = np.empty((num_experts, num_rows), np.float32) if fmt.has_channel_scale else None
    for e in range(num_experts):
        weights = _matrix(name, source[e], e, shape[1:])
        channel_scale = None if scale is None else scale[e]
        task = ext.quantize_task(fmt.name, weights, codes[e], channel_scale, pool=engine.backend_)
        try:
            engine.run(task)
        except ValueError as error:
            where = str(error).removeprefix("weights: ")
            raise ValueError(f"{name}: expert {e}, {where}") from None
        done()
    return Projection(codes, channel_scale=scale)


def _check_number(name: str, source: Any, shape: tuple[int, int, int]) -> None:
    """Raise unless there is a matrix for every expert."""
    if isinstance(source, list | tuple):
        if len(source) != shape[0]:
            raise ValueError(f"{name}: got {len(source)} arrays, expected {shape[0]}")
        return
    if not hasattr(source, "shape"):
        raise TypeError(f"{name}: got {type(source).__name__}, expected an array")
    if tuple(source.shape) != shape:
        got = f"{getattr(source, 'dtype', '')} {list(source.shape)}".strip()
        raise ValueError(f"{name}: got {got}, expected {ArraySpec(_DTYPES, shape)}")


def _matrix(name: str, item: Any, e: int, shape: tuple[int, ...]) -> Array:
    """The matrix of one expert as the engine reads it."""
    matrix = as_numpy(item, name)
    MappedFiles([matrix]).check()
    ArraySpec(_DTYPES, shape, otherwise=methods_that_take).check(name, matrix, of=f" for expert {e}")
    if matrix.dtype == np.float16:
        return matrix.astype(np.float32)  # which has the same numbers
    has_gaps = matrix.shape[1] > 1 and matrix.strides[1] != matrix.itemsize
    return matrix.copy() if has_gaps or not matrix.flags.aligned else matrix
