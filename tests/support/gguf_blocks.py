"""Blocks of GGUF for tests: where the scales of a type are, and how large its weights come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
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
    """Draw blocks of any codes, uint8 [*scales.shape, bytes of a block], with scales about as given."""
    found = GGUF_BLOCKS[name]
    return _with_scales(rng, name, found.block_bytes, found.halves, scales)


def _with_scales(
    rng: np.random.Generator, name: str, block_bytes: int, halves: tuple[int, ...], scales: AnyArray
) -> AnyArray:
    blocks = rng.integers(0, 256, (*scales.shape, block_bytes), np.uint8)
    for at in halves:
        blocks[..., at : at + 2] = scales.astype("<f2")[..., None].view(np.uint8)
    if name in _SET_SCALES:
        _SET_SCALES[name](blocks, scales)
    return blocks


def _set_mxfp4(blocks: AnyArray, scales: AnyArray) -> None:
    """Powers of two: the next below, without a sign."""
    blocks[..., 0] = np.clip(np.frexp(scales)[1] + 127, 1, 254)


def _set_nvfp4(blocks: AnyArray, scales: AnyArray) -> None:
    """The same for groups of 16."""
    numbers = np.abs(scales).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    blocks[..., :4] = np.where(numbers == 127, 126, numbers)[..., None]


def _set_iq1_m(blocks: AnyArray, scales: AnyArray) -> None:
    """A float16 in the upper nibbles of four words."""
    half = scales.astype("<f2").view(np.uint16)
    for i in range(4):
        upper = blocks[..., 49 + 2 * i]
        blocks[..., 49 + 2 * i] = upper & 15 | (half >> (4 * i) & 15).astype(np.uint8) << 4


#: Of types whose scale is no float16 in two bytes of its own.
_SET_SCALES: Mapping[str, Callable[[AnyArray, AnyArray], None]] = {
    "mxfp4": _set_mxfp4,
    "nvfp4": _set_nvfp4,
    "iq1_m": _set_iq1_m,
}


def _block_of(fmt: GgufFormat) -> GgufBlock:
    """Find the float16 numbers of a type: with one that is infinite, a block of zeros is no more finite."""
    halves = []
    for at in range(fmt.block_bytes - 1):
        block = np.zeros(fmt.block_bytes, np.uint8)
        block[at : at + 2] = np.array([np.inf], "<f2").view(np.uint8)
        if not np.isfinite(_decoded(block, fmt)).all():
            halves.append(at)
    rng, ones = np.random.default_rng(0), np.ones(50)
    blocks = _with_scales(rng, fmt.name, fmt.block_bytes, tuple(halves), ones)
    typical = float(np.sqrt(np.mean(np.square(_decoded(blocks, fmt)))))
    return GgufBlock(fmt.block, fmt.block_bytes, tuple(halves), typical)


def _decoded(blocks: AnyArray, fmt: GgufFormat) -> AnyArray:
    with np.errstate(invalid="ignore"):
        return decode_gguf(blocks, fmt.name).astype(np.float64)


#: The types of blocks, by name.
GGUF_BLOCKS: Mapping[str, GgufBlock] = {
    name: _block_of(fmt) for name, fmt in GGUF_FORMATS.items() if fmt.block > 1
}
