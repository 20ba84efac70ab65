"""Arrays that a layer of quantized experts is given, checked before anything is quantized."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from ..arrays.checks import Array, as_numpy, bfloat16, expert_arrays, expert_ids, numpy_matrices
from ..arrays.spec import ArraySpec
from ..formats.quantized import QuantizedFormat
from ..formats.weights import Projection

__all__ = [
    "are_codes",
    "check_only_used",
    "checked_biases",
    "checked_map",
    "given_projection",
    "viewed_matrices",
]


def viewed_matrices(name: str, source: Any) -> Any:
    """The NumPy arrays of the same memory; as they are, what has no memory of its own and is copied later."""
    first = source[0] if isinstance(source, list | tuple) and source else source
    in_memory = any(hasattr(first, protocol) for protocol in ("__array_interface__", "__dlpack__"))
    return numpy_matrices(name, source) if in_memory else source


def are_codes(source: Any) -> bool:
    """Whether these weights are quantized."""
    return _dtype(source) == "uint8"


def check_only_used(sources: Mapping[str, Any], scales: Mapping[str, Any], present: Container[str]) -> None:
    """Raise ValueError for weights that the layer does not have, and for scales without quantized weights."""
    for name, source in sources.items():
        for what, value in ((name, source), (_scale_of(name), scales[name])):
            if name not in present and value is not None:
                raise ValueError(f"{what}: got one, expected None: the activation is not gated")
        if scales[name] is not None and not are_codes(source):
            raise ValueError(
                f"{_scale_of(name)}: got one, expected None: {name} is {_dtype(source)}, and quantized "
                "weights are uint8"
            )


def given_projection(
    fmt: QuantizedFormat, name: str, codes: Any, scale: Any, shape: tuple[int, int, int]
) -> Projection:
    """Quantized weights of the caller, when they are what they should be; nothing is copied.

    `shape` is E, N and K. Codes are not looked at.
    """
    num_experts, num_rows, num_columns = shape
    shape = num_experts, num_rows, fmt.row_bytes(num_columns)
    matrices = expert_arrays(name, codes, ArraySpec((np.dtype(np.uint8),), shape))
    name = _scale_of(name)
    if not fmt.has_channel_scale:
        if scale is not None:
            raise ValueError(f"{name}: got one, expected None: rows of {fmt.name} contain their scales")
        return Projection(matrices)
    scales = expert_arrays(name, scale, ArraySpec((np.dtype(np.float32),), (num_experts, num_rows)))
    for e, values in enumerate(scales):
        wrong = ~np.isfinite(values)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(f"{name}: expert {e}, row {row}: got {values[row]}, expected finite scales")
    return Projection(matrices, channel_scale=scales)


def checked_biases(
    biases: Mapping[str, Any], num_experts: int, num_rows: Mapping[str, int]
) -> dict[str, Array]:
    """The biases that are given, by projection; `num_rows` has the projections that there are.

    Raises
    ------
    TypeError
        Not an array, or another dtype.
    ValueError
        Another shape, or of a projection that the layer does not have.
    """
    checked = {}
    for projection, bias in biases.items():
        if bias is None:
            continue
        name = projection.replace("_proj", "_bias")
        if projection not in num_rows:
            raise ValueError(f"{name}: got one, expected None: the activation is not gated")
        array, shape = as_numpy(bias, name), (num_experts, num_rows[projection])
        ArraySpec((np.dtype(np.float32), bfloat16), shape).check(name, array)
        checked[projection] = np.ascontiguousarray(array)
    return checked


def checked_map(physical_to_logical_map: Any, num_experts: int) -> Array | None:
    """The map as int64 [E].

    Raises
    ------
    TypeError
        Not integers.
    ValueError
        Another shape.
    IndexError
        An entry outside 0 to E - 1.
    """
    name = "physical_to_logical_map"
    if physical_to_logical_map is None:
        return None
    experts = expert_ids(physical_to_logical_map, name)
    ArraySpec((np.dtype(np.int64),), (num_experts,)).check(name, experts)
    wrong = (experts < 0) | (experts >= num_experts)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise IndexError(f"{name}: got expert {experts[at]} at {at}, expected 0 to {num_experts - 1}")
    return experts


def _scale_of(projection: str) -> str:
    return projection.replace("_proj", "_scale")


def _dtype(source: Any) -> str:
    """The name of the dtype of an array of any framework, or of the first of several."""
    first = source[0] if isinstance(source, list | tuple) and source else source
    return str(getattr(first, "dtype", type(first).__name__)).removeprefix("torch.")
