"""The tensor types of GGUF files that the engine computes from: how many bytes hold how many weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["GGUF_FORMATS", "GgufFormat"]


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


#: The formats by name.
GGUF_FORMATS: Mapping[str, GgufFormat] = {
    name: GgufFormat(name, block, block_bytes)
    for name, block, block_bytes in (
        ("f32", 1, 4),
        ("f16", 1, 2),
        ("bf16", 1, 2),
        ("q4_0", 32, 18),
        ("q4_1", 32, 20),
        ("q5_0", 32, 22),
        ("q5_1", 32, 24),
        ("q8_0", 32, 34),
        ("q2_k", 256, 84),
        ("q3_k", 256, 110),
        ("q4_k", 256, 144),
        ("q5_k", 256, 176),
        ("q6_k", 256, 210),
        ("iq4_nl", 32, 18),
        ("iq4_xs", 256, 136),
    )
}
