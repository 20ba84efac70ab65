"""The GGUF tensor types that the engine supports, with the sizes of their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .. import kt_kernel_ext as ext

__all__ = ["GGUF_FORMATS", "GGUF_NUMBERS", "PLAIN_DTYPES", "GgufFormat"]


@dataclass(frozen=True)
class GgufFormat:
    """One tensor type: blocks of equal size, one after the other along a row."""

    name: str  #: in small letters
    block: int  #: weights of a block
    block_bytes: int

    def row_bytes(self, num_columns: int) -> int:
        """Count the bytes of a row of so many weights, a multiple of `block`.

        Examples
        --------
        >>> [GGUF_FORMATS[name].row_bytes(512) for name in ("bf16", "q4_0", "q4_k")]
        [1024, 288, 288]
        """
        return num_columns // self.block * self.block_bytes


#: The formats by their numbers in a file.
GGUF_NUMBERS: Mapping[int, GgufFormat] = {
    info.gguf_type: GgufFormat(info.name, info.block, info.row_bytes(info.block))
    for info in ext.formats()
    if info.gguf_type is not None
}

#: The formats by name.
GGUF_FORMATS: Mapping[str, GgufFormat] = {fmt.name: fmt for fmt in GGUF_NUMBERS.values()}

#: The types whose weights are numbers as NumPy has them, little-endian as in files.
PLAIN_DTYPES: Mapping[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
