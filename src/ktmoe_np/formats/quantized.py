"""The encodings of quantized weights: the bytes of a row, what they may not be, and the numbers in them.

`ktmoe_np.reference.packing` lays the bytes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kt_kernel_ext as ext

__all__ = ["FORMATS", "QuantizedFormat"]


@dataclass(frozen=True, eq=False)
class QuantizedFormat:
    """One way to encode rows of weights as integers and scales."""

    info: ext.FormatInfo

    @property
    def name(self) -> str:
        """The name of the format in `ktmoe_np.kt_kernel_ext.quantize_task`."""
        return self.info.name

    @property
    def bits(self) -> int:
        """Bits of a code: 4 or 8."""
        return self.info.code_bytes(8)

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale inside the row; None: the row has one scale."""
        return self.info.group

    @property
    def has_channel_scale(self) -> bool:
        """Whether every row has a float32 scale, separate from the codes."""
        return self.info.has_channel_scale

    def row_bytes(self, num_columns: int) -> int:
        """Count the bytes of a row of so many weights.

        Examples
        --------
        >>> [FORMATS[name].row_bytes(48) for name in ("int8", "int8_group32", "int4_group32")]
        [48, 56, 26]
        """
        return self.info.row_bytes(num_columns)

    def problem(self, codes: NDArray[np.uint8], num_columns: int) -> str | None:
        """Describe the first invalid code of rows [N, row_bytes]; None if all are valid.

        Channel scales are not checked.
        """
        if self.bits == 8:
            values = codes[:, :num_columns].view(np.int8)
            found = _first("code", values, values == -128, "-127 to 127")
            if found is None and self.group_size is not None:
                scales = np.ascontiguousarray(codes[:, num_columns:]).view("<f4")
                found = _first("scale", scales, ~np.isfinite(scales), "a finite number")
            return found
        num_pairs = -(-num_columns // 2)
        multipliers = codes[:, num_pairs:].view(np.int8)
        wrong = (multipliers < -15) | (multipliers > 15) | (multipliers == 0)
        found = _first("multiplier", multipliers, wrong, "-15 to 15 and not 0")
        if found is None and num_columns % 2:
            unused = codes[:, num_pairs - 1 : num_pairs] >> np.uint8(4)
            found = _first("unused bits", unused, unused != 0, "0")
        return found


def _first(what: str, values: NDArray[Any], wrong: NDArray[np.bool_], expected: str) -> str | None:
    """Say where the first wrong value of a matrix is."""
    if not wrong.any():
        return None
    row, column = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    return f"row {row}: got {what} {values[row, column]}, expected {expected}"


_ORDER = {fmt.name: place for place, fmt in enumerate(ext.formats())}

#: The formats by name, in the order in which the extension names them.
FORMATS: Mapping[str, QuantizedFormat] = {
    fmt.name: QuantizedFormat(fmt)
    for fmt in sorted(
        (fmt for method in ext.methods() if method.weights == "quantized" for fmt in method.formats),
        key=lambda fmt: _ORDER[fmt.name],
    )
}
