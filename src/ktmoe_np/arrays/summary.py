"""One line about an object or an array, as `repr` and messages have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["array_summary", "arrays_summary", "object_summary"]


def object_summary(of: object, describe: Callable[[], str]) -> str:
    """The `repr` of an object: its class, and what `describe` says of its sizes and its state.

    A `repr` is what debuggers and tracebacks show, also of an object whose constructor failed halfway. So it
    never raises: where `describe` does, it is the class alone.

    Examples
    --------
    >>> object_summary([1, 2], lambda: "2 items")
    '<list 2 items>'
    >>> object_summary([], lambda: undefined)
    '<list>'
    """
    name = type(of).__name__
    try:
        text = " ".join(describe().split())  # a path may have line breaks
    except Exception:
        text = ""
    return f"<{name} {text}>" if text else f"<{name}>"


def array_summary(array: Any) -> str:
    """Dtype and shape, as messages have them.

    Examples
    --------
    >>> import numpy as np
    >>> array_summary(np.zeros((2, 3), np.int8))
    'int8 [2, 3]'
    """
    return f"{array.dtype} {list(array.shape)}"


def arrays_summary(arrays: Mapping[str, Any]) -> str:
    """Names of arrays, with their dtypes and shapes.

    Of a sequence with an array for each expert, the number of arrays and what the first is.

    Examples
    --------
    >>> import numpy as np
    >>> arrays_summary({"a": np.zeros(2), "b": [np.zeros(3), np.zeros(3)], "c": None})
    'a float64 [2], b 2 x float64 [3]'
    """
    parts = []
    for name, value in arrays.items():
        if isinstance(value, list | tuple):
            parts.append(f"{name} {len(value)} x {array_summary(value[0])}" if value else f"{name} empty")
        elif value is not None:
            parts.append(f"{name} {array_summary(value)}")
    return ", ".join(parts)
