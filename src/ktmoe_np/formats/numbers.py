"""Weights that are plain numbers, as the engine takes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import kt_kernel_ext as ext
from ..arrays.checks import expert_arrays
from ..arrays.library import dtype_name
from ..arrays.spec import ArraySpec
from .gguf import PLAIN_DTYPES
from .methods import methods_that_take
from .weights import Projection

__all__ = ["NUMBER_DTYPES", "number_rows"]

#: Dtypes that numbers may have. The first is the engine's own; of the others it takes bytes.
NUMBER_DTYPES = tuple(
    np.dtype(name)
    for method in ext.methods()
    if (method.mode, method.weights) == ("inference", "native") and not method.scales
    for name in method.codes
)

_FORMATS = {dtype: name for name, dtype in PLAIN_DTYPES.items()}


def number_rows(name: str, codes: Any, shape: tuple[int, int, int]) -> Projection:
    """Numbers of the caller, checked where the engine does not check them; nothing is copied.

    Parameters
    ----------
    name : str
        What messages call the projection.
    codes : array [E, N, K] of one of `NUMBER_DTYPES`, or E arrays [N, K] of the same dtype
    shape : tuple of int
        E, N and K.

    Raises
    ------
    TypeError
        Another dtype, or a last axis with gaps.
    ValueError
        Another shape or number of arrays.

    Examples
    --------
    >>> rows = number_rows("gate_proj", np.ones((1, 2, 4), np.float32), (1, 2, 4))
    >>> rows.format, rows.codes.dtype, rows.codes.shape
    ('f32', dtype('uint8'), (1, 2, 16))
    """
    is_sequence = isinstance(codes, list | tuple)
    first = codes[0] if is_sequence and codes else codes
    known = {dtype.name: dtype for dtype in NUMBER_DTYPES}
    if not hasattr(first, "dtype") or dtype_name(first) == NUMBER_DTYPES[0].name:
        return Projection(codes)  # to be checked by the engine
    dtype = known.get(dtype_name(first))
    if dtype is None:
        spec = ArraySpec(NUMBER_DTYPES, shape[1:] if is_sequence else shape, otherwise=methods_that_take)
        spec.check(name, first)
    assert dtype is not None
    rows = expert_arrays(name, codes, ArraySpec((dtype,), shape, as_bytes=True))
    return Projection(rows, format=_FORMATS[dtype])
