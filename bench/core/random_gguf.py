"""GGUF types without an encoder here: random blocks, which the shared bf16 weights are then decoded from.

Codes are any bytes. Blocks are kept by what they decode to: finite weights, of one size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .gguf_layer import PROJECTIONS, layer_in_blocks
from .layer import Array, Layer

__all__ = ["RandomGguf", "random_formats"]

#: Blocks of a layer; every matrix is a window of them that begins elsewhere. A prime: no multiple of a row.
_POOL = 2503

#: Blocks that are drawn at a time, to keep some of them.
_DRAWN = 1 << 13


@dataclass(frozen=True)
class RandomGguf:
    """A GGUF tensor type that is known by its sizes alone."""

    name: str
    block: int  #: weights of a block
    block_bytes: int
    tolerance: float = 0.02  #: relative error from which on an answer is wrong: that of arithmetic alone

    def encode(self, layer: Layer) -> dict[str, Any]:
        """Make the blocks of a layer, a projection in one array as in a file.

        Raises
        ------
        ValueError
            Rows are not whole blocks.
        """
        return layer_in_blocks(layer, self.name, self.block, self.block_bytes, self._write)

    def _write(self, projection: str, weights: Array, rows: Array) -> None:
        self._fill(projection, rows, _draw_pool(self, weights.shape[2])[0])

    def replace_weights(self, layer: Layer) -> None:
        """Replace a layer's bf16 weights with those that `encode` makes blocks of.

        Nothing is replaced where rows are not whole blocks: backends then fail to load, with that reason.
        """
        matrices = {name: getattr(layer, name) for name in PROJECTIONS}
        if all(weights.shape[2] % self.block == 0 for weights in matrices.values()):
            for name, weights in matrices.items():
                self._fill(name, weights, _draw_pool(self, weights.shape[2])[1])

    def _fill(self, name: str, matrices: Array, pool: Array) -> None:
        """Fill each expert's matrix with the pool: the same blocks, whether `pool` is encoded or decoded."""
        rng = np.random.default_rng(PROJECTIONS.index(name))
        for matrix in matrices:
            blocks = matrix.reshape(-1, pool.shape[1])
            at = (int(rng.integers(len(pool))) + np.arange(len(blocks))) % len(pool)
            blocks[:] = pool[at]


@cache
def _draw_pool(fmt: RandomGguf, num_columns: int) -> tuple[Array, Array]:
    """Draw blocks uint8 [n, bytes] for rows of that length, and their weights, bf16 [n, block].

    Kept are those whose root mean square is within a factor of 2 of one size.

    That size is 1 / sqrt(columns), as that of other methods' weights, or, where a type hardly goes so far
    (NVFP4's own scales do not), the nearest that some of its random blocks have.
    """
    rng = np.random.default_rng(num_columns)
    draws = _finite_blocks(fmt, rng)
    blocks, weights, sizes = next(draws)
    size = np.clip(num_columns**-0.5, *np.quantile(sizes, (0.02, 0.98)))
    kept: list[tuple[Array, Array]] = []
    while sum(len(some) for some, _ in kept) < _POOL:
        near = (sizes >= size / 2) & (sizes <= 2 * size)
        kept.append((blocks[near], weights[near]))
        blocks, weights, sizes = next(draws)
    whole_blocks, whole_weights = (np.concatenate(parts)[:_POOL] for parts in zip(*kept, strict=True))
    return whole_blocks, whole_weights


def _finite_blocks(fmt: RandomGguf, rng: np.random.Generator) -> Iterator[tuple[Array, Array, Array]]:
    """Draw blocks of any bytes whose weights are finite, with the weights and their root mean square."""
    from ktmoe_np.reference import decode_gguf

    while True:
        blocks = rng.integers(0, 256, (_DRAWN, fmt.block_bytes), np.uint8)
        with np.errstate(all="ignore"):
            weights = decode_gguf(blocks, fmt.name.lower())
            sizes = np.sqrt(np.square(weights.astype(np.float32)).mean(axis=1))
        usable = np.isfinite(sizes) & (sizes > 0)
        yield blocks[usable], weights[usable], sizes[usable]


def random_formats(encoded: set[str]) -> list[RandomGguf]:
    """List the GGUF types of the library that are not among those encoded.

    An interpreter that has a peer but not the library has none of them.
    """
    try:
        from ktmoe_np.formats.gguf import GGUF_FORMATS
    except (ImportError, AttributeError):
        return []
    formats = [RandomGguf(fmt.name.upper(), fmt.block, fmt.block_bytes) for fmt in GGUF_FORMATS.values()]
    return [fmt for fmt in formats if fmt.name not in encoded]
