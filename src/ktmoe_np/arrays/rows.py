"""The rows of passes, with any leading axes: hidden states, ids, routing weights and results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .checks import as_numpy, expert_ids
from .host import check_not_differentiated, giver_of, to_write
from .spec import ArraySpec
from .types import Array, bfloat16

__all__ = ["HIDDEN_DTYPES", "RowForm", "hidden_rows", "routes", "rows_to_write", "weights_of_routes"]

_FLOAT32 = np.dtype(np.float32)

#: What hidden states may come in; all but the first are rounded to it.
HIDDEN_DTYPES = (bfloat16, _FLOAT32, np.dtype(np.float16))


class RowForm(NamedTuple):
    """What results look like that have a row for each row of an argument."""

    lead: tuple[int, ...]  #: the leading axes, whose product is T
    give: Callable[[Array], Any]  #: makes a NumPy array one of the argument's kind

    def of(self, rows: Array) -> Any:
        """Rows [T, N] as an array [..., N] of the argument's kind."""
        return self.give(rows if len(self.lead) == 1 else rows.reshape(*self.lead, rows.shape[-1]))


def hidden_rows(value: Any, name: str, hidden_size: int) -> tuple[Array, RowForm]:
    """Hidden states, or gradients of them, as bfloat16 [T, H], and the form of results.

    Those in float32 or float16 are rounded once.

    Raises
    ------
    TypeError
        Not an array on the CPU, another dtype, one that requires grad, or gaps between rows of several axes.
    ValueError
        Another shape.
    """
    give: Callable[[Array], Any] = _same
    array = value
    if type(value) is not np.ndarray:
        check_not_differentiated(value, name)
        array, give = as_numpy(value, name), giver_of(value)
    if array.dtype is not bfloat16 or array.ndim != 2 or array.shape[1] != hidden_size:
        ArraySpec(HIDDEN_DTYPES, ("...", hidden_size)).check(name, array)
        if array.dtype != bfloat16:
            with np.errstate(over="ignore"):  # beyond bfloat16 is infinity, as rounding has it
                array = np.ascontiguousarray(array).astype(bfloat16)
    return _flat(array, name), RowForm(array.shape[:-1], give)


def routes(ids: Any, lead: tuple[int, ...], num_slots: int) -> NDArray[np.int64]:
    """Expert ids [..., P] as int64 [T, P].

    Raises
    ------
    TypeError
        Not integers.
    ValueError
        Another shape.
    IndexError
        Beyond int64.
    """
    found = expert_ids(ids)
    if found.shape != (*lead, num_slots):
        ArraySpec((), (*lead, num_slots)).check("topk_ids", found)
    return found if found.ndim == 2 else found.reshape(math.prod(lead), num_slots)


def weights_of_routes(weights: Any, lead: tuple[int, ...], num_slots: int) -> NDArray[np.float32]:
    """Routing weights [..., P] in any float dtype as contiguous float32 [T, P].

    Raises
    ------
    TypeError
        Not an array on the CPU, not floats, or one that requires grad.
    ValueError
        Another shape.
    """
    array = weights
    if type(weights) is not np.ndarray:
        check_not_differentiated(weights, "topk_weights")
        array = as_numpy(weights, "topk_weights")
    if array.dtype != _FLOAT32 and not _is_float(array.dtype):
        ArraySpec((_FLOAT32,), ("...", num_slots), "floats").check("topk_weights", array)
    if array.shape != (*lead, num_slots):
        ArraySpec((_FLOAT32,), (*lead, num_slots)).check("topk_weights", array)
    with np.errstate(over="ignore"):  # beyond float32 is infinity
        found: NDArray[np.float32] = np.ascontiguousarray(array, _FLOAT32)
    return found if found.ndim == 2 else found.reshape(math.prod(lead), num_slots)


def rows_to_write(value: Any, name: str, lead: tuple[int, ...], width: int) -> Array:
    """An array [..., N] that results are written to, as [T, N]; the engine checks its dtype.

    Raises
    ------
    TypeError
        Not an array on the CPU, one that cannot be written, or gaps between rows of several axes.
    ValueError
        Another shape.
    """
    array = to_write(value, name)
    if len(lead) == 1:
        return array
    ArraySpec((), (*lead, width)).check(name, array)
    return _flat(array, name)


def _same(array: Array) -> Array:
    return array


def _is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is a float of NumPy or bfloat16."""
    return dtype.name.removeprefix("b").startswith("float")


def _flat(array: Array, name: str) -> Array:
    """Rows of any leading axes as [T, N], in the same memory."""
    if array.ndim == 2:
        return array
    if array.size and not array.flags.c_contiguous:
        raise TypeError(f"{name}: got gaps or another order of {list(array.shape)}, expected it C-contiguous")
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])
