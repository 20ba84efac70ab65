"""Deferred experts: what a layer leaves for the next one to begin with.

Of each token the slots with the largest weights are computed at once; the others go into a buffer while the
caller is already busy with what follows, and the next layer's output starts from that buffer. Layers follow
each other by their `layer_idx`; there is one chain in an engine, and one for each CUDA stream.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Carry", "DeferralChain", "HostCarry"]


@dataclass(frozen=True)
class Carry:
    """What a layer left over: experts' outputs, weighted and summed, not yet in any layer's output."""

    layer_idx: int
    output: NDArray[np.float32]  #: [T, H]


@dataclass(frozen=True)
class HostCarry(Carry):
    """What a layer left over on the host."""

    ticket: int  #: of the task that writes it


CarryT = TypeVar("CarryT", bound=Carry)


class DeferralChain(Generic[CarryT]):
    """The carry from layer to layer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._carry: CarryT | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether a layer has left something."""
        return self._carry is not None

    def receive(self, layer_idx: int, batch_size: int) -> CarryT | None:
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
            num_tokens = carry.output.shape[0]
            if num_tokens != batch_size:
                raise ValueError(
                    f"hidden_states: got {batch_size} tokens, but layer {carry.layer_idx} deferred experts "
                    f"of {num_tokens} tokens"
                )
            return carry

    def leave(self, carry: CarryT | None) -> None:
        """Replace what was received by what this layer leaves."""
        with self._lock:
            self._carry = carry

    def take(self) -> CarryT | None:
        """What is left, for the end of a pass."""
        with self._lock:
            carry, self._carry = self._carry, None
            return carry
