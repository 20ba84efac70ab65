"""The matrices of fused adapters: how PEFT lays out those of a parameter that holds all experts.

With E experts, rank R and a product of K columns and N rows::

    lora_A [E * R, K]    expert by expert, R rows each
    lora_B [N, R * E]    column r * E + e is column r of expert e

Gate and up are one parameter of 2I rows, with one A. Two of rank R are written as one of rank 2R: the A one
after the other, B block-diagonal::

    A = [Ag]      B = [Bg  0 ]   rows of gate
        [Au]          [0   Bu]   rows of up
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...arrays.checks import Array

__all__ = ["Fused", "joined", "packed", "parted", "unpacked", "widened", "without_cross_terms"]


class Fused(NamedTuple):
    """The adapters of all experts of one product."""

    a: Array  #: [E, R, K]
    b: Array  #: [E, N, R]

    @property
    def rank(self) -> int:
        """R."""
        return int(self.a.shape[1])


def packed(adapter: Fused, *, swapped: bool) -> tuple[Array, Array]:
    """Lay out adapters as PEFT stores them: lora_A and lora_B.

    `swapped` is for families whose weights are transposed while PEFT takes them as they stand: the delta is
    transposed, so each matrix takes the place of the other.
    """
    a, b = adapter
    if swapped:
        a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
    return a.reshape(-1, a.shape[2]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def unpacked(lora_a: Array, lora_b: Array, rank: int, *, swapped: bool) -> Fused:
    """Undo `packed`; the sizes have been checked."""
    a = lora_a.reshape(-1, rank, lora_a.shape[1])
    b = lora_b.reshape(lora_b.shape[0], rank, -1).transpose(2, 0, 1)
    return Fused(b.transpose(0, 2, 1), a.transpose(0, 2, 1)) if swapped else Fused(a, b)


def joined(gate: Fused, up: Fused, *, interleaved: bool) -> Fused:
    """Gate and up as one product, of the ranks of both together."""
    gate_rows, up_rows = _rows(2 * gate.b.shape[1], interleaved)
    dtype = np.result_type(gate.b, up.b)
    b = np.zeros((len(gate.b), 2 * gate.b.shape[1], gate.rank + up.rank), dtype)
    b[:, gate_rows, : gate.rank] = gate.b
    b[:, up_rows, gate.rank :] = up.b
    return Fused(np.concatenate([gate.a, up.a], axis=1), b)


def parted(adapter: Fused, rank: int, *, interleaved: bool) -> tuple[Fused, Fused] | None:
    """Gate and up of rank `rank`, filled up with zeros where there are fewer columns.

    None when that rank is too small.
    """
    gate_rows, up_rows = _rows(adapter.b.shape[1], interleaved)
    if adapter.rank <= rank:
        whole = widened(adapter, rank)
        return Fused(whole.a, whole.b[:, gate_rows]), Fused(whole.a, whole.b[:, up_rows])
    if adapter.rank != 2 * rank or not without_cross_terms(adapter, interleaved=interleaved):
        return None
    (a_gate, a_up), b = np.split(adapter.a, 2, axis=1), adapter.b
    return Fused(a_gate, b[:, gate_rows, :rank]), Fused(a_up, b[:, up_rows, rank:])


def widened(adapter: Fused, rank: int) -> Fused:
    """The same product with more columns, which are zero."""
    more = rank - adapter.rank
    return Fused(
        np.pad(adapter.a, ((0, 0), (0, more), (0, 0))), np.pad(adapter.b, ((0, 0), (0, 0), (0, more)))
    )


def without_cross_terms(adapter: Fused, *, interleaved: bool) -> bool:
    """Whether B of gate and up is block-diagonal, so that each has an A of its own."""
    half, odd = divmod(adapter.rank, 2)
    gate_rows, up_rows = _rows(adapter.b.shape[1], interleaved)
    b = adapter.b
    return not (odd or b[:, gate_rows, half:].any() or b[:, up_rows, :half].any())


def _rows(num_rows: int, interleaved: bool) -> tuple[slice, slice]:
    """Where the rows of gate and of up are."""
    if interleaved:
        return slice(0, None, 2), slice(1, None, 2)
    return slice(0, num_rows // 2), slice(num_rows // 2, None)
