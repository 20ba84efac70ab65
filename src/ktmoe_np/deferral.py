"""Deferred experts: what a layer leaves for the next one to begin with.

Of each token the slots with the largest weights are computed at once; the others go into a buffer while the
caller is already busy with what follows, and the next layer's output starts from that buffer. Layers follow
each other by their `layer_idx`; there is one chain in an engine.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .buffers import BufferSlot

__all__ = ["Carry", "DeferralChain", "split_slots"]


def split_slots(
    ids: NDArray[np.int64], weights: NDArray[np.float32], num_deferred: int, slot: BufferSlot
) -> None:
    """Write `ids` to the slot's immediate and deferred ids, -1 where a slot of the token is not in its part.

    Immediate are, of each token, all but `num_deferred` slots: those with the largest weights, ties by slot.

    Raises
    ------
    ValueError
        Weights of another shape.
    """
    if weights.shape != ids.shape:
        raise ValueError(f"topk_weights: got shape {list(weights.shape)}, expected {list(ids.shape)}")
    num_immediate = ids.shape[1] - num_deferred
    order = np.argsort(-weights, axis=1, kind="stable")
    is_immediate = np.zeros(ids.shape, bool)
    np.put_along_axis(is_immediate, order[:, :num_immediate], True, axis=1)
    slot.immediate_ids[...] = np.where(is_immediate, ids, -1)
    slot.deferred_ids[...] = np.where(is_immediate, -1, ids)


@dataclass(frozen=True)
class Carry:
    """What a layer left over: experts' outputs, weighted and summed, not yet in any layer's output."""

    layer_idx: int
    output: NDArray[np.float32]  #: [T, H]
    ticket: int  #: of the task that writes it


class DeferralChain:
    """The carry from layer to layer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._carry: Carry | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether a layer has left something."""
        return self._carry is not None

    def receive(self, layer_idx: int, batch_size: int) -> Carry | None:
        """What the layer's output starts from; None when no layer left anything.

        Raises
        ------
        RuntimeError
            The layer does not come after the one that left it: a new pass has begun before the last was
            drained.
        ValueError
            It has another number of tokens.
        """
        with self._lock:
            carry = self._carry
            if carry is None:
                return None
            if layer_idx <= carry.layer_idx:
                raise RuntimeError(
                    f"layer {layer_idx}: the deferred experts of layer {carry.layer_idx} are left over from "
                    "the pass before; call drain_deferred() after the last layer of a pass"
                )
            if carry.output.shape[0] != batch_size:
                raise ValueError(
                    f"hidden_states: got {batch_size} tokens, but layer {carry.layer_idx} deferred experts "
                    f"of {carry.output.shape[0]} tokens"
                )
            return carry

    def leave(self, carry: Carry | None) -> None:
        """Replace what was received by what this layer leaves."""
        with self._lock:
            self._carry = carry

    def take(self) -> Carry | None:
        """What is left, for the end of a pass."""
        with self._lock:
            carry, self._carry = self._carry, None
            return carry
