"""Arrays as the engine takes them. It checks dtypes, shapes and order itself; here are the conversions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import shown_integer
from .host import as_numpy
from .spec import ArraySpec
from .types import Array, bfloat16

__all__ = [
    "Array",
    "as_numpy",
    "at_least",
    "bfloat16",
    "chosen_experts",
    "each_expert",
    "expert_arrays",
    "expert_ids",
    "integer",
    "numpy_if_given",
    "numpy_matrices",
]


def expert_ids(ids: Any, name: str = "topk_ids") -> NDArray[np.int64]:
    """Ids of any integer dtype and order as contiguous int64; not copied when they are.

    Raises
    ------
    TypeError
        Not integers.
    IndexError
        Beyond int64.
    """
    array = ids if type(ids) is np.ndarray else _integers(ids, name)
    if array.dtype == np.int64 and array.flags.c_contiguous:
        return array
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: got {array.dtype} {list(array.shape)}, expected an integer dtype")
    if array.dtype == np.uint64:  # ids beyond int64 must not come out negative, which would skip them
        largest = np.iinfo(np.int64).max
        if array.size and array.max() > largest:
            where = np.argwhere(array > largest)[0].tolist()
            raise IndexError(f"{name}: got expert {array.max()} at {where}, expected at most {largest}")
    return np.ascontiguousarray(array, np.int64)


def chosen_experts(experts: Any, num_experts: int) -> tuple[int, ...]:
    """Ids of different experts of a layer of so many, checked.

    Raises
    ------
    TypeError
        Not integers.
    ValueError
        Not one row of them, none, or one twice.
    IndexError
        One that the layer does not have.

    Examples
    --------
    >>> chosen_experts([5, 0, 3], 8)
    (5, 0, 3)
    """
    array = expert_ids(experts, "experts")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"experts: got shape {list(array.shape)}, expected [n] with n of at least 1")
    chosen = tuple(array.tolist())
    seen: set[int] = set()
    for at, e in enumerate(chosen):
        if not 0 <= e < num_experts:
            raise IndexError(f"experts: got expert {e} at {at}, expected 0 to {num_experts - 1}")
        if e in seen:
            raise ValueError(f"experts: got expert {e} twice, expected different ones")
        seen.add(e)
    return chosen


def _integers(ids: Any, name: str) -> Array:
    """Ids from any library, or in lists, as an array."""
    if not isinstance(ids, list | tuple):
        return as_numpy(ids, name)
    try:
        return np.asarray(ids)
    except (TypeError, ValueError) as error:  # of lists of other lengths
        raise TypeError(f"{name}: got {type(ids).__name__}, expected integers on the CPU: {error}") from error


def numpy_if_given(name: str, value: Any) -> Array | None:
    """An array from any library as a NumPy array; None stays."""
    return None if value is None else as_numpy(value, name)


def numpy_matrices(name: str, source: Any) -> Any:
    """One array from any library for all experts, or a sequence of them, as NumPy arrays; None stays.

    Raises
    ------
    TypeError
        Not arrays, or not on the CPU.
    """
    if isinstance(source, list | tuple):
        return [as_numpy(item, f"{name}[{e}]") for e, item in enumerate(source)]
    return numpy_if_given(name, source)


def each_expert(
    name: str, source: Any, num_experts: int, check: Callable[[Array, tuple[int, ...]], Array]
) -> Array | list[Array]:
    """One array for all experts, or a sequence of one for each, checked one by one.

    `check` takes an array and the axes that it has before those of an expert's.

    Raises
    ------
    TypeError, ValueError
        Not arrays, another number of them, and what `check` raises.
    """
    if not isinstance(source, list | tuple):
        return check(as_numpy(source, name), (num_experts,))
    if len(source) != num_experts:
        raise ValueError(f"{name}: got {len(source)} arrays, expected {num_experts}")
    return [check(as_numpy(item, name), ()) for item in source]


def expert_arrays(name: str, source: Any, spec: ArraySpec) -> Array | list[Array]:
    """One array for all experts, or a sequence of one for each, as `ArraySpec.checked` returns them.

    The first axis of the spec is that of the experts, which each array of a sequence does not have.

    Raises
    ------
    TypeError, ValueError
        Not arrays, another number of them, and what `ArraySpec.checked` raises.
    """
    num_experts, *shape = spec.shape
    assert isinstance(num_experts, int)

    def check(array: Array, lead: tuple[int, ...]) -> Array:
        return replace(spec, shape=(*lead, *shape)).checked(name, array)

    return each_expert(name, source, num_experts, check)


def integer(name: str, value: Any) -> int:
    """`value` as an int.

    Raises
    ------
    TypeError
        Not an integer.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {value!r}, expected an integer")
    return int(value)


def at_least(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """`value` as an int of at least `least`, and at most `most`, by default what the core can take.

    Raises
    ------
    TypeError
        Not an integer.
    ValueError
        Below `least` or above `most`.
    """
    number = integer(name, value)
    if number < least:
        raise ValueError(f"{name}: got {shown_integer(number)}, expected {least} or more")
    if number > most:
        raise ValueError(f"{name}: got {shown_integer(number)}, expected at most {most}")
    return number
