"""The encodings that checkpoints come in: which arrays make a projection, and what the engine is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows its dtypes by name
import numpy as np

from .. import kt_kernel_ext as ext
from ..arrays.checks import Array, as_numpy, each_expert, expert_arrays
from ..arrays.spec import ArraySpec
from .gptq import first_not_float16, group_sizes, q4_0_rows
from .methods import format_names, methods_that_take
from .weights import Projection
from .zero_points import int4_zp_rows

__all__ = ["NATIVE_FORMATS", "NativeFormat"]

_FLOAT32 = (np.dtype(np.float32),)
_UINT8 = (np.dtype(np.uint8),)

#: The largest zero point that the engine has: q - z is then an int8 of few bits.
_MAX_ZERO = 31


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
    def has_zero_points(self) -> bool:
        """Whether groups have a zero point each."""
        return False

    @property
    def is_converted(self) -> bool:
        """Whether rows are made of what is given, and the result is kept."""
        return False

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
        self,
        projection: str,
        codes: Any,
        scale: Any,
        global_scale: Any,
        shape: tuple[int, int, int],
        zero: Any = None,
    ) -> Projection:
        """The caller's arrays as the engine takes them, checked.

        Codes and separate scales are not copied, and their contents not checked. `shape` is E, N and K.

        Raises
        ------
        TypeError
            Not arrays, or another dtype.
        ValueError
            Another shape or number of arrays; a `global_scale` or `zero` that the format does not have.
        """
        num_experts, num_rows, num_columns = shape
        self._check_extras(projection, global_scale, zero)
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

    def _check_extras(self, projection: str, global_scale: Any, zero: Any) -> None:
        """Raise ValueError when there is one that the format does not have."""
        if global_scale is not None and not self.has_global_scale:
            raise ValueError(
                f"{projection}_global_scale: got one, expected None: {self.name} has no scale of a matrix"
            )
        if zero is not None and not self.has_zero_points:
            raise ValueError(f"{projection}_zero: got some, expected None: {self.name} has no zero points")


@dataclass(frozen=True)
class ConvertedFormat(NativeFormat):
    """An encoding whose rows are made of what is given: blocks, which contain the scales of groups."""

    @property
    def group_size(self) -> int | None:
        """None: the number of groups tells it."""
        return None

    @property
    def is_converted(self) -> bool:
        """True."""
        return True

    def matrix_bytes(self, num_rows: int, num_columns: int) -> int:
        """Count the bytes of a converted matrix, including scales.

        Examples
        --------
        >>> NATIVE_FORMATS["gptq_int4"].matrix_bytes(10, 64)
        360
        """
        return num_rows * self.row_bytes(num_columns)

    def matrices(
        self,
        projection: str,
        codes: Any,
        scale: Any,
        global_scale: Any,
        shape: tuple[int, int, int],
        zero: Any = None,
    ) -> Projection:
        """Rows made of arrays of the caller, when they are what they should be.

        `shape` is E, N and K.

        Raises
        ------
        TypeError
            Not arrays, or another dtype.
        ValueError
            A K that is no multiple of a block, another shape or number of arrays, groups that a block does
            not divide, a scale in bfloat16 that float16 does not have, a zero point above 31, or a
            `global_scale` or `zero` that the format does not have.
        """
        self._check_extras(projection, global_scale, zero)
        if shape[2] % self.info.block:
            raise ValueError(
                f"{projection}_proj: got {shape[2]} columns, expected a multiple of "
                f"{self.info.block} with {self.name}"
            )
        return Projection(self._blocks(projection, codes, scale, zero, shape))

    def _blocks(
        self, projection: str, codes: Any, scale: Any, zero: Any, shape: tuple[int, int, int]
    ) -> list[Array]:
        """The rows of each expert; see `matrices`."""
        raise NotImplementedError

    def _scales(self, name: str, scale: Any, num_experts: int, spec: ArraySpec) -> Array | list[Array]:
        """Scales of each expert, numbers that float16 has; `spec` is of one expert's."""

        def checked(array: Array, lead: tuple[int, ...]) -> Array:
            replace(spec, shape=(*lead, *spec.shape)).check(name, array)
            unrepresentable = first_not_float16(array)
            if unrepresentable is not None:
                raise ValueError(
                    f"{name}: got {unrepresentable:g} in {array.dtype}, expected numbers that float16 has"
                )
            return array

        return each_expert(name, scale, num_experts, checked)


@dataclass(frozen=True)
class GptqFormat(ConvertedFormat):
    """Symmetric GPTQ, whose rows are not contiguous."""

    def _blocks(
        self, projection: str, codes: Any, scale: Any, zero: Any, shape: tuple[int, int, int]
    ) -> list[Array]:
        """The rows of each expert; see `matrices`."""
        num_experts, num_rows, num_columns = shape
        shape = num_experts, num_columns // 8, num_rows
        words = ArraySpec(self.code_dtypes, shape, otherwise=methods_that_take)
        packed = expert_arrays(f"{projection}_proj", codes, words)
        groups, float16 = {"G": group_sizes(num_columns)}, self.scale_dtypes[0].name
        spec = ArraySpec(self.scale_dtypes, ("G", num_rows), float16, sizes=groups)
        scales = self._scales(f"{projection}_scale", scale, num_experts, spec)
        return list(q4_0_rows(packed, scales))


@dataclass(frozen=True)
class ZeroPointFormat(ConvertedFormat):
    """int4 with zero points: rows of nibbles, and a scale and a zero point for each group of a row."""

    @property
    def has_zero_points(self) -> bool:
        """True."""
        return True

    def _blocks(
        self, projection: str, codes: Any, scale: Any, zero: Any, shape: tuple[int, int, int]
    ) -> list[Array]:
        """The rows of each expert; see `matrices`."""
        num_experts, num_rows, num_columns = shape
        nibbles = ArraySpec(
            self.code_dtypes, (num_rows, num_columns // 2), as_bytes=True, otherwise=methods_that_take
        )
        name = f"{projection}_proj"

        def rows(array: Array, lead: tuple[int, ...]) -> Array:
            replace(nibbles, shape=(*lead, *nibbles.shape)).check(name, array)
            return np.ascontiguousarray(array).view(np.uint8)

        packed = each_expert(name, codes, num_experts, rows)
        sizes = group_sizes(num_columns)
        groups = {"G": [count for count, size in sizes.items() if size % self.info.block == 0]}
        float16 = self.scale_dtypes[0].name
        spec = ArraySpec(self.scale_dtypes, (num_rows, "G"), float16, sizes=groups)
        scales = self._scales(f"{projection}_scale", scale, num_experts, spec)
        num_groups = scales[0].shape[1]
        for e, array in enumerate(scales):
            if array.shape[1] != num_groups:
                raise ValueError(
                    f"{projection}_scale: got {array.shape[1]} groups for expert {e}, expected {num_groups}, "
                    "as for expert 0"
                )
        zeros = expert_arrays(
            f"{projection}_zero", zero, ArraySpec(_UINT8, (num_experts, num_rows, num_groups))
        )
        for e, array in enumerate(zeros):
            if array.size and array.max() > _MAX_ZERO:
                raise ValueError(
                    f"{projection}_zero: got {array.max()} for expert {e}, expected at most {_MAX_ZERO}"
                )
        return list(int4_zp_rows(packed, scales, zeros, self.info.block))


def _as_columns(scale: Any) -> Any:
    """Scales of rows [E, N] as [E, N, 1]."""
    if isinstance(scale, list | tuple):
        return [one[:, None] if getattr(one, "ndim", None) == 1 else one for one in scale]
    return scale[:, :, None] if getattr(scale, "ndim", None) == 2 else scale


def _encodings(method: ext.MethodInfo) -> Iterator[NativeFormat]:
    """The encodings of a method, one for each of its group sizes."""
    codes, scales = (tuple(map(np.dtype, names)) for names in (method.codes, method.scales))
    for info, name in zip(method.formats, format_names(method).values(), strict=True):
        yield _kind_of(info)(name, info, codes, scales)


def _kind_of(info: ext.FormatInfo) -> type[NativeFormat]:
    """The class of an encoding by its rows: those of blocks are made of arrays of codes and scales."""
    if info.gguf_type is not None:
        return GptqFormat
    return NativeFormat if info.block == 1 else ZeroPointFormat


#: The encodings by name.
NATIVE_FORMATS: Mapping[str, NativeFormat] = {
    fmt.name: fmt
    for method in ext.methods()
    if method.mode == "inference" and method.scales
    for fmt in _encodings(method)
}
