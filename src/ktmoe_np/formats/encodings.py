"""The encodings that checkpoints come in: which arrays make a projection, and what the engine is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows its dtypes by name
import numpy as np

from .. import kt_kernel_ext as ext
from ..arrays.checks import Array, as_numpy, each_expert
from ..arrays.summary import array_summary
from .gptq import BLOCK_SIZE, first_not_float16, group_sizes, q4_0_rows
from .methods import format_names
from .weights import Projection

__all__ = ["NATIVE_FORMATS", "NativeFormat"]

_UINT8 = np.dtype(np.uint8)


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
        code_rows = _experts(
            f"{projection}_proj",
            codes,
            self.code_dtypes,
            num_experts,
            (num_rows, self.row_bytes(num_columns)),
        )
        name, wanted = f"{projection}_scale", self.scale_shape(num_rows, num_columns)
        if self.group_size is None:
            flat = _experts(name, _as_columns(scale), self.scale_dtypes, num_experts, wanted, as_bytes=False)
            return Projection(
                code_rows, channel_scale=[np.ascontiguousarray(one.reshape(-1)) for one in flat]
            )
        size = wanted[1] * self.scale_dtypes[0].itemsize
        scales = _experts(name, scale, self.scale_dtypes, num_experts, (wanted[0], size))
        if not self.has_global_scale:
            return Projection(code_rows, scales)
        name = f"{projection}_global_scale"
        values = as_numpy(global_scale, name)
        if values.dtype != np.float32:
            raise TypeError(f"{name}: got {values.dtype}, expected float32 [{num_experts}]")
        if values.shape != (num_experts,):
            raise ValueError(f"{name}: got float32 {list(values.shape)}, expected float32 [{num_experts}]")
        rows = [np.full(num_rows, value, np.float32) for value in values]  # the engine takes one for each
        return Projection(code_rows, scales, rows)

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
        words = (num_columns // 8, num_rows)
        packed = _experts(f"{projection}_proj", codes, self.code_dtypes, num_experts, words, as_bytes=False)
        name = f"{projection}_scale"
        scales = each_expert(
            name, scale, num_experts, lambda array, lead: self._checked_scale(name, array, lead, shape)
        )
        return Projection(list(q4_0_rows(packed, scales)))

    def _checked_scale(
        self, name: str, array: Array, lead: tuple[int, ...], shape: tuple[int, int, int]
    ) -> Array:
        """The scales of one expert or of all, when they are what they should be."""
        counts = group_sizes(shape[2])
        right = {(*lead, count, shape[1]) for count in counts}
        if array.dtype not in self.scale_dtypes or array.shape not in right:
            groups = " or ".join(map(str, counts))
            expected = f"float16 {[*lead, 'G', shape[1]]}".replace("'", "") + f" with G = {groups}"
            kind = ValueError if array.dtype in self.scale_dtypes else TypeError
            raise kind(f"{name}: got {array_summary(array)}, expected {expected}")
        unrepresentable = first_not_float16(array)
        if unrepresentable is not None:
            raise ValueError(
                f"{name}: got {unrepresentable:g} in {array.dtype}, expected numbers that float16 has"
            )
        return array


def _as_columns(scale: Any) -> Any:
    """Scales of rows [E, N] as [E, N, 1]."""
    if isinstance(scale, list | tuple):
        return [one[:, None] if getattr(one, "ndim", None) == 1 else one for one in scale]
    return scale[:, :, None] if getattr(scale, "ndim", None) == 2 else scale


def _experts(
    name: str,
    source: Any,
    dtypes: tuple[np.dtype[Any], ...],
    num_experts: int,
    shape: tuple[int, int],
    *,
    as_bytes: bool = True,
) -> list[Array]:
    """E arrays of a shape, in bytes or as they are, from one array or a sequence of them."""
    return list(
        each_expert(
            name,
            source,
            num_experts,
            lambda array, lead: _checked(name, array, dtypes, (*lead, *shape), as_bytes),
        )
    )


def _checked(
    name: str, array: Array, dtypes: tuple[np.dtype[Any], ...], shape: tuple[int, ...], as_bytes: bool
) -> Array:
    """The array, or its bytes, when its dtype is one of those and its shape is that, in bytes or not."""
    size = array.dtype.itemsize if as_bytes else 1
    has_shape = array.ndim == len(shape) and (*array.shape[:-1], array.shape[-1] * size) == shape
    if array.dtype not in dtypes or not has_shape:
        kind = ValueError if array.dtype in dtypes else TypeError
        raise kind(f"{name}: got {array_summary(array)}, expected {_expected(dtypes, shape, as_bytes)}")
    if not as_bytes:
        return array
    if array.shape[-1] > 1 and array.strides[-1] != size:
        raise TypeError(f"{name}: got strides {list(array.strides)}, expected a contiguous last axis")
    return array.view(_UINT8)


def _expected(dtypes: tuple[np.dtype[Any], ...], shape: tuple[int, ...], as_bytes: bool) -> str:
    dtype = dtypes[0]
    last = shape[-1] // dtype.itemsize if as_bytes else shape[-1]
    return f"{dtype} {[*shape[:-1], last]}"


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
