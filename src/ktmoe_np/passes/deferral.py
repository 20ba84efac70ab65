"""Deferred experts: what a layer leaves for the next one to begin with.

Of each token the slots with the largest weights are computed at once; the others go into a buffer while the
caller is already busy with what follows, and the next layer's output starts from that buffer. Layers follow
each other by their `layer_idx` along a chain: there is one in an engine, which threads use in turn, one for
each CUDA stream, and as many as callers make.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import kt_kernel_ext as ext
from ..arrays.checks import Array, bfloat16
from ..arrays.summary import object_summary
from ..buffers import BufferSlot, KExpertsCPUBuffer
from ..config import MoEConfig
from .pending import is_of_a_handler

__all__ = ["Carry", "CarryChain", "DeferralChain", "HostCarry", "SharedChain"]


@dataclass(frozen=True)
class Carry:
    """What a layer left over: experts' outputs, weighted and summed, not yet in any layer's output."""

    layer_idx: int
    output: NDArray[np.float32]  #: [T, H]


@dataclass(frozen=True)
class HostCarry(Carry):
    """What a layer left over on the host."""

    ticket: ext.Ticket  #: of the task that writes it
    engine: ext.CPUInfer  #: which runs that


CarryT = TypeVar("CarryT", bound=Carry)


class CarryChain(Generic[CarryT]):
    """The carry from layer to layer. Whoever uses it holds a lock from what it receives to what it leaves."""

    def __init__(self) -> None:
        self._carry: CarryT | None = None

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        carry = self._carry
        return "empty" if carry is None else f"with deferred experts of layer {carry.layer_idx}"

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
        self._carry = carry

    def take(self) -> CarryT | None:
        """What is left, for the end of a pass."""
        carry = self._carry
        self.leave(None)
        return carry


class DeferralChain(CarryChain[HostCarry]):
    """What layers that defer experts leave for each other, in passes on arrays of the host.

    Layers that are called without one share the chain of their engine, which one thread at a time can use.
    Threads that run passes side by side give each pass a chain of its own, and so hand a pass over to another
    thread: the calls of one pass, from its first layer to `drain_deferred`, have the same chain.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> from ktmoe_np import DeferralChain, KTMoEWrapper
    >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=2, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2", max_deferred_experts_per_token=1)
    >>> first, last = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
    >>> moe.load_weights_from_tensors(first, None, last)
    >>> x, weights = np.ones((1, 4), ml_dtypes.bfloat16), np.array([[0.75, 0.25]], np.float32)
    >>> chain = DeferralChain()
    >>> float(moe.forward(x, np.array([[0, 1]]), weights, chain=chain)[0, 0])
    24.0
    >>> float(KTMoEWrapper.drain_deferred(chain=chain)[0, 0]), chain.is_waiting
    (8.0, False)
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = ext.CallLock("chain")
        self._slots: tuple[BufferSlot, ...] = ()

    def slots(self, config: MoEConfig, batch_size: int) -> tuple[BufferSlot, ...]:
        """The buffers of its passes, which those of other chains may not overwrite."""
        sizes = batch_size, config.hidden_size, config.num_experts_per_tok
        if not self._slots or (*self._slots[0].input.shape, self._slots[0].weights.shape[1]) != sizes:
            self._slots = tuple(BufferSlot.allocate(*sizes) for _ in range(KExpertsCPUBuffer.buffer_depth))
        return self._slots

    def put_back(self, received: HostCarry | None, left: HostCarry | None) -> None:
        """Undo what a pass did that has received one carry and left another, if it was the last."""
        with self.lock:
            if self._carry is left:
                self.leave(received)

    def drain(self) -> Array | None:
        """What is left, rounded, when it has been computed; None when nothing is."""
        with self.lock:
            carry = self._to_drain()
            if carry is None:
                return None
            try:
                carry.engine.wait(carry.ticket)
            except Exception as error:
                if not is_of_a_handler(error):
                    self.leave(None)
                raise
            output = carry.output.astype(bfloat16)  # before others may write to the buffer
            self.leave(None)
            return output

    def _to_drain(self) -> HostCarry | None:
        return self._carry


class _Thread:
    """A thread, also one that Python has not started: it lives as long as the thread does."""


_here = threading.local()


def _this_thread() -> _Thread:
    try:
        found: _Thread = _here.thread
    except AttributeError:
        found = _here.thread = _Thread()
    return found


class SharedChain(DeferralChain):
    """The chain of all passes that were given none: what a thread has left there is for that thread alone."""

    def __init__(self) -> None:
        super().__init__()
        self._thread: weakref.ref[_Thread] | None = None  # that has left something
        self._thread_name = ""

    def slots(self, config: MoEConfig, batch_size: int) -> tuple[BufferSlot, ...]:
        """Those of all passes of that size."""
        slots: tuple[BufferSlot, ...] = KExpertsCPUBuffer.get_buffer(
            batch_size, config.hidden_size, config.num_experts_per_tok
        )
        return slots

    def receive(self, layer_idx: int, batch_size: int) -> HostCarry | None:
        """As of any chain.

        Raises
        ------
        RuntimeError
            Also for what another thread has left.
        """
        if self._is_of_another_thread():
            raise RuntimeError(f"layer {layer_idx}: {self._whose()}")
        return super().receive(layer_idx, batch_size)

    def leave(self, carry: HostCarry | None) -> None:
        """Replace what was received by what this layer leaves, for the same thread."""
        self._thread = None if carry is None else weakref.ref(_this_thread())
        self._thread_name = threading.current_thread().name
        self._carry = carry

    def _to_drain(self) -> HostCarry | None:
        if self._is_of_another_thread() and self._thread is not None and self._thread() is not None:
            raise RuntimeError(f"drain_deferred: {self._whose()}")
        return self._carry

    def _is_of_another_thread(self) -> bool:
        return self._carry is not None and (self._thread is None or self._thread() is not _this_thread())

    def _whose(self) -> str:
        assert self._carry is not None
        assert self._thread is not None
        what = f"a pass that has deferred experts of layer {self._carry.layer_idx}"
        if self._thread() is None:
            return f"{what} was not drained by thread {self._thread_name!r}, now ended; call drain_deferred()"
        return (
            f"{what} is under way in thread {self._thread_name!r}; threads that run passes side by side, or "
            "hand one over, give every pass a chain=DeferralChain() of its own"
        )
