"""Blocks of GGUF for tests: where the scales of a type are, and how large its weights come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ktmoe_np.formats.gguf import GGUF_FORMATS, GgufFormat
from ktmoe_np.reference import decode_gguf

__all__ = ["GGUF_BLOCKS", "GgufBlock", "draw_blocks"]

AnyArray = Any


class GgufBlock(NamedTuple):
    """What is to be known of a type to draw blocks of it."""

    block: int
    block_bytes: int
    halves: tuple[int, ...]  #: bytes of a block where a float16 scale or offset begins
    typical: float  #: about how large a weight is when those are 1


def draw_blocks(rng: np.random.Generator, name: str, scales: AnyArray) -> AnyArray:
    """Blocks of any codes, uint8 [*scales.shape, bytes of a block], whose float16 numbers are given."""
    found = GGUF_BLOCKS[name]
    return _with_halves(rng, found.block_bytes, found.halves, scales)


def _with_halves(
    rng: np.random.Generator, block_bytes: int, halves: tuple[int, ...], scales: AnyArray
) -> AnyArray:
    blocks = rng.integers(0, 256, (*scales.shape, block_bytes), np.uint8)
    for at in halves:
        blocks[..., at : at + 2] = scales.astype("<f2")[..., None].view(np.uint8)
    return blocks


def _described(fmt: GgufFormat) -> GgufBlock:
    """Find the float16 numbers of a type: with one that is infinite, a block of zeros is no more finite."""
    halves = []
    for at in range(fmt.block_bytes - 1):
        block = np.zeros(fmt.block_bytes, np.uint8)
        block[at : at + 2] = np.array([np.inf], "<f2").view(np.uint8)
        if not np.isfinite(_decoded(block, fmt)).all():
            halves.append(at)
    blocks = _with_halves(np.random.default_rng(0), fmt.block_bytes, tuple(halves), np.ones(50))
    typical = float(np.sqrt(np.mean(np.square(_decoded(blocks, fmt)))))
    return GgufBlock(fmt.block, fmt.block_bytes, tuple(halves), typical)


def _decoded(blocks: AnyArray, fmt: GgufFormat) -> AnyArray:
    with np.errstate(invalid="ignore"):
        return decode_gguf(blocks, fmt.name).astype(np.float64)


#: The types of blocks, by name.
GGUF_BLOCKS: Mapping[str, GgufBlock] = {
    name: _described(fmt) for name, fmt in GGUF_FORMATS.items() if fmt.block > 1
}
