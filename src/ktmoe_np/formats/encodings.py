"""The encodings that checkpoints come in: which arrays make a projection, and what the engine is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows its dtypes by name
import numpy as np

from .. import kt_kernel_ext as ext
from ..arrays.checks import Array, as_numpy, each_expert, expert_arrays
from ..arrays.spec import ArraySpec
from .gptq import BLOCK_SIZE, first_not_float16, group_sizes, q4_0_rows
from .methods import format_names, methods_that_take
from .weights import Projection

__all__ = ["NATIVE_FORMATS", "NativeFormat"]

_FLOAT32 = (np.dtype(np.float32),)


@dataclass(frozen=True)
class NativeFormat:
    """One encoding."""

    name: str  #: that of its method for inference, in small letters, with the groups where there is a choice
    info: ext.FormatInfo  #: layout of the engine's rows
    code_dtypes: tuple[np.dtype[Any], ...]  #: as which codes may be given; all mean the same bytes
    scale_dtypes: tuple[np.dtype[Any], ...]

    @property
    def scale_rows(self) -> int:
        """Rows that share a row of scales."""
        return self.info.scale_rows or 1

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None: all of a row."""
        return self.info.group

    @property
    def has_global_scale(self) -> bool:
        """Whether a matrix has a float32 scale too, which the engine takes for each of its rows."""
        return self.info.has_channel_scale and self.group_size is not None

    @property
    def method(self) -> str:
        """The method for inference."""
        return self.name.partition("_group")[0].upper()

    def row_bytes(self, num_columns: int) -> int:
        """Count the bytes of a row of codes.

        Examples
        --------
        >>> NATIVE_FORMATS["mxfp4"].row_bytes(48), NATIVE_FORMATS["fp8"].row_bytes(48)
        (24, 48)
        """
        return self.info.row_bytes(num_columns)

    def scale_shape(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """The shape of an expert's scales.

        Examples
        --------
        >>> [NATIVE_FORMATS[name].scale_shape(700, 256) for name in ("fp8", "fp8_perchannel", "mxfp4")]
        [(6, 2), (700, 1), (700, 8)]
        """
        return -(-num_rows // self.scale_rows), -(-num_columns // (self.group_size or num_columns))

    def matrix_bytes(self, num_rows: int, num_columns: int) -> int:
        """Count the bytes of a matrix, scales included."""
        rows, columns = self.scale_shape(num_rows, num_columns)
        size = num_rows * self.row_bytes(num_columns) + rows * columns * self.scale_dtypes[0].itemsize
        return size + (4 if self.has_global_scale else 0)

    def matrices(
        self, projection: str, codes: Any, scale: Any, global_scale: Any, shape: tuple[int, int, int]
    ) -> Projection:
        """The caller's arrays as the engine takes them, checked.

        Codes and separate scales are not copied, and their contents not checked. `shape` is E, N and K.

        Raises
        ------
        TypeError
            Not arrays, or another dtype.
        ValueError
            Another shape or number of arrays; a `global_scale` that the format does not have.
        """
        num_experts, num_rows, num_columns = shape
        self._check_global_scale(projection, global_scale)
        rows = num_experts, num_rows, self.row_bytes(num_columns) // self.code_dtypes[0].itemsize
        code_spec = ArraySpec(self.code_dtypes, rows, as_bytes=True, otherwise=methods_that_take)
        code_rows = list(expert_arrays(f"{projection}_proj", codes, code_spec))
        name, wanted = f"{projection}_scale", (num_experts, *self.scale_shape(num_rows, num_columns))
        if self.group_size is None:
            flat = expert_arrays(name, _as_columns(scale), ArraySpec(self.scale_dtypes, wanted))
            return Projection(
                code_rows, channel_scale=[np.ascontiguousarray(one.reshape(-1)) for one in flat]
            )
        scales = list(expert_arrays(name, scale, ArraySpec(self.scale_dtypes, wanted, as_bytes=True)))
        if not self.has_global_scale:
            return Projection(code_rows, scales)
        name = f"{projection}_global_scale"
        values, spec = as_numpy(global_scale, name), ArraySpec(_FLOAT32, (num_experts,))
        if not spec.has_dtype(values):
            raise TypeError(f"{name}: got {values.dtype}, expected {spec}")
        spec.check(name, values)
        of_rows = [np.full(num_rows, value, np.float32) for value in values]  # the engine takes one for each
        return Projection(code_rows, scales, of_rows)

    def _check_global_scale(self, projection: str, global_scale: Any) -> None:
        """Raise ValueError when there is one that the format does not have."""
        if global_scale is not None and not self.has_global_scale:
            raise ValueError(
                f"{projection}_global_scale: got one, expected None: {self.name} has no scale of a matrix"
            )


@dataclass(frozen=True)
class GptqFormat(NativeFormat):
    """The encoding whose rows are not contiguous: they are converted, and the result is kept."""

    @property
    def group_size(self) -> int | None:
        """None: the number of groups tells it."""
        return None

    def matrix_bytes(self, num_rows: int, num_columns: int) -> int:
        """Count the bytes of a converted matrix, including scales.

        Examples
        --------
        >>> NATIVE_FORMATS["gptq_int4"].matrix_bytes(10, 64)
        360
        """
        return num_rows * self.row_bytes(num_columns)

    def matrices(
        self, projection: str, codes: Any, scale: Any, global_scale: Any, shape: tuple[int, int, int]
    ) -> Projection:
        """Rows made of arrays of the caller, when they are what they should be.

        `shape` is E, N and K.

        Raises
        ------
        TypeError
            Not arrays, or another dtype.
        ValueError
            A K that is no multiple of 32, another shape or number of arrays, a scale in bfloat16 that float16
            does not have, or a `global_scale`.
        """
        num_experts, num_rows, num_columns = shape
        self._check_global_scale(projection, global_scale)
        if num_columns % BLOCK_SIZE:
            raise ValueError(
                f"{projection}_proj: got {num_columns} columns, expected a multiple of "
                f"{BLOCK_SIZE} with {self.name}"
            )
        shape = num_experts, num_columns // 8, num_rows
        words = ArraySpec(self.code_dtypes, shape, otherwise=methods_that_take)
        packed = expert_arrays(f"{projection}_proj", codes, words)
        name, groups = f"{projection}_scale", {"G": group_sizes(num_columns)}
        float16 = self.scale_dtypes[0].name  # bfloat16 is taken too, where float16 has its numbers

        def checked(array: Array, lead: tuple[int, ...]) -> Array:
            ArraySpec(self.scale_dtypes, (*lead, "G", num_rows), float16, sizes=groups).check(name, array)
            unrepresentable = first_not_float16(array)
            if unrepresentable is not None:
                raise ValueError(
                    f"{name}: got {unrepresentable:g} in {array.dtype}, expected numbers that float16 has"
                )
            return array

        scales = each_expert(name, scale, num_experts, checked)
        return Projection(list(q4_0_rows(packed, scales)))


def _as_columns(scale: Any) -> Any:
    """Scales of rows [E, N] as [E, N, 1]."""
    if isinstance(scale, list | tuple):
        return [one[:, None] if getattr(one, "ndim", None) == 1 else one for one in scale]
    return scale[:, :, None] if getattr(scale, "ndim", None) == 2 else scale


def _encodings(method: ext.MethodInfo) -> Iterator[NativeFormat]:
    """The encodings of a method, one for each of its group sizes."""
    codes, scales = (tuple(map(np.dtype, names)) for names in (method.codes, method.scales))
    for info, name in zip(method.formats, format_names(method).values(), strict=True):
        # Arrays of codes and scales are converted to blocks.
        kind = NativeFormat if info.gguf_type is None else GptqFormat
        yield kind(name, info, codes, scales)


#: The encodings by name.
NATIVE_FORMATS: Mapping[str, NativeFormat] = {
    fmt.name: fmt
    for method in ext.methods()
    if method.mode == "inference" and method.scales
    for fmt in _encodings(method)
}
