"""What the products of a layer take activations in, as callers name it."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np

__all__ = ["ACTIVATION_DTYPES", "ActivationDtype", "activation_dtype_name"]

#: A name, or the dtype itself: ``np.int8``, ``ml_dtypes.bfloat16``.
ActivationDtype: TypeAlias = Literal["bfloat16", "int8"] | type[Any] | np.dtype[Any]

#: The names.
ACTIVATION_DTYPES = ("bfloat16", "int8")


def activation_dtype_name(activation_dtype: ActivationDtype | None) -> str | None:
    """The name of an `activation_dtype`; None for None, which leaves the choice to the layer.

    Raises
    ------
    TypeError
        Neither a name nor a dtype.
    ValueError
        Another dtype. Whether a layer has products of this one is for the engine to check.

    Examples
    --------
    >>> import ml_dtypes
    >>> activation_dtype_name("int8"), activation_dtype_name(ml_dtypes.bfloat16)
    ('int8', 'bfloat16')
    """
    if activation_dtype is None:
        return None
    expected = f"expected None, {' or '.join(repr(name) for name in ACTIVATION_DTYPES)}"
    try:
        is_name = isinstance(activation_dtype, str)
        name = str(activation_dtype) if is_name else np.dtype(activation_dtype).name
    except TypeError:
        raise TypeError(f"activation_dtype: got {activation_dtype!r}, {expected}") from None
    if name not in ACTIVATION_DTYPES:
        raise ValueError(f"activation_dtype: got {name!r}, {expected}")
    return name
