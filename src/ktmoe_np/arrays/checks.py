"""Arrays as the engine takes them. It checks dtypes, shapes and order itself; here are the conversions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import shown_integer
from .library import dtype_name, is_of
from .spec import ArraySpec
from .types import Array, bfloat16

__all__ = [
    "Array",
    "as_numpy",
    "at_least",
    "bfloat16",
    "count_tokens",
    "each_expert",
    "expert_arrays",
    "expert_ids",
    "integer",
    "routing_weights",
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
    if type(ids) is np.ndarray and ids.dtype == np.int64 and ids.flags.c_contiguous:
        return ids
    try:
        array = np.asarray(ids)
    except (TypeError, ValueError) as error:  # of an array on a GPU, or lists of other lengths
        raise TypeError(f"{name}: got {type(ids).__name__}, expected integers on the CPU: {error}") from error
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: got {array.dtype} {list(array.shape)}, expected an integer dtype")
    if array.dtype == np.uint64:  # ids beyond int64 must not come out negative, which would skip them
        largest = np.iinfo(np.int64).max
        if array.size and array.max() > largest:
            where = np.argwhere(array > largest)[0].tolist()
            raise IndexError(f"{name}: got expert {array.max()} at {where}, expected at most {largest}")
    return np.ascontiguousarray(array, np.int64)


def routing_weights(weights: Any) -> Any:
    """Weights that are contiguous, so that slices of a router's output will do; else as they are."""
    if type(weights) is np.ndarray and not weights.flags.c_contiguous:
        return np.ascontiguousarray(weights)
    return weights


_BATCH = ArraySpec((), ("T", "H"))


def count_tokens(hidden_states: Any, name: str = "hidden_states") -> int:
    """T, from an array [T, H].

    Raises
    ------
    TypeError
        Not an array.
    ValueError
        Not two axes.
    """
    if not hasattr(hidden_states, "shape"):
        kind = type(hidden_states).__name__
        raise TypeError(f"{name}: got {kind}, expected an array of bfloat16 [T, H]")
    _BATCH.check(name, hidden_states)
    return int(hidden_states.shape[0])


def as_numpy(value: Any, name: str) -> Array:
    """An array from any library as a NumPy array, to be read by Python.

    Raises
    ------
    TypeError
        Not an array, or one that is not on the CPU.
    """
    if isinstance(value, np.ndarray):
        return value
    if not any(hasattr(value, protocol) for protocol in ("__array__", "__dlpack__")):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an array")
    try:
        if is_of("torch", value) and dtype_name(value) == "bfloat16":
            # NumPy takes these through no protocol; float32 has the same values.
            return np.asarray(value.float()).astype(bfloat16)
        return np.asarray(value) if hasattr(value, "__array__") else np.from_dlpack(value)
    except (TypeError, RuntimeError, ValueError, BufferError) as error:
        raise TypeError(
            f"{name}: got {type(value).__name__}, expected an array that NumPy can read: {error}"
        ) from error


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
