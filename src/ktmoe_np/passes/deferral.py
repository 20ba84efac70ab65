"""Deferred experts: how the deferred output of a layer reaches the next one.

What a pass receives and leaves, and when its parts run, is documented in cpp/moe/deferred_pass.h. Layers
follow each other by their `layer_idx` along a chain: there is one in an engine, which threads use in turn,
one for each CUDA stream, and as many as callers make.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from .. import kt_kernel_ext as ext
from ..arrays.checks import Array, bfloat16
from ..arrays.rows import RowForm
from ..arrays.summary import object_summary
from ..buffers import BatchBuffers, KExpertsCPUBuffer
from ..config import MoEConfig
from .pending import is_of_a_handler

__all__ = ["DeferralChain", "HostOutput", "LayerOutput", "OutputChain", "SharedChain"]


@dataclass(frozen=True)
class LayerOutput:
    """The deferred output of a layer."""

    output: ext.moe.DeferredOutput


@dataclass(frozen=True)
class HostOutput(LayerOutput):
    """The deferred output of a layer whose tasks the host has submitted."""

    ticket: ext.Ticket  #: of the last task that writes it
    engine: ext.CPUInfer  #: which runs that
    form: RowForm  #: of the pass's results, and so of the drained


OutputT = TypeVar("OutputT", bound=LayerOutput)


class OutputChain(Generic[OutputT]):
    """The deferred output on its way from layer to layer.

    Its user keeps a lock from `receive_output` to `leave_output`.
    """

    def __init__(self) -> None:
        self._output: OutputT | None = None

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        waiting = self._output
        return "empty" if waiting is None else f"with deferred experts of layer {waiting.output.layer_idx}"

    @property
    def is_waiting(self) -> bool:
        """Whether a deferred output waits for the next layer, or to be drained."""
        return self._output is not None

    def receive_output(self, layer_idx: int) -> OutputT | None:
        """The deferred output that the layer adds; None when there is none.

        Raises
        ------
        RuntimeError
            The layer does not come after the one that deferred it: a new pass has begun before the last was
            drained.
        """
        received = self._output
        if received is not None and layer_idx <= received.output.layer_idx:
            raise RuntimeError(
                f"layer {layer_idx}: the deferred experts of layer {received.output.layer_idx} are left over "
                "from the pass before; call drain_deferred() after the last layer of a pass"
            )
        return received

    def leave_output(self, output: OutputT | None) -> None:
        """Replace what was received by what this layer leaves."""
        self._output = output

    def take_output(self) -> OutputT | None:
        """The remaining deferred output, for the end of a pass."""
        output = self._output
        self.leave_output(None)
        return output


class DeferralChain(OutputChain[HostOutput]):
    """Deferred outputs passed from layer to layer, in passes on host arrays.

    Layers that are called without one share the chain of their engine, which one thread at a time can use.
    Threads that run passes side by side use one chain per pass; the same chain moves a pass to another
    thread: the calls of one pass, from its first layer to `drain_deferred`, have the same chain.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> from ktmoe_np import DeferralChain, KTMoEWrapper
    >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=2, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2", max_deferred_experts_per_token=1)
    >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
    >>> moe.load_weights_from_tensors(gate, None, down)
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
        self._buffers: tuple[BatchBuffers, ...] = ()

    def buffers(self, config: MoEConfig, batch_size: int) -> tuple[BatchBuffers, ...]:
        """The buffers of its passes, which those of other chains may not overwrite."""
        sizes = batch_size, config.hidden_size, config.num_experts_per_tok
        if not self._buffers or (*self._buffers[0].input.shape, self._buffers[0].weights.shape[1]) != sizes:
            self._buffers = tuple(
                BatchBuffers.allocate(*sizes) for _ in range(KExpertsCPUBuffer.buffer_depth)
            )
        return self._buffers

    def put_back(self, received: HostOutput | None, carried: HostOutput | None) -> None:
        """Undo a pass that received one output and carried another to the next layer, if it was the last."""
        with self.lock:
            if self._output is carried:
                self.leave_output(received)

    def drain(self) -> Any:
        """The remaining deferred output, computed and rounded; None when there is none."""
        with self.lock:
            remaining = self._to_drain()
            if remaining is None:
                return None
            try:
                remaining.engine.wait(remaining.ticket)
                remaining.output.raise_error()
            except Exception as error:
                if not is_of_a_handler(error):
                    self.leave_output(None)
                raise
            sums = np.asarray(remaining.output.sums)
            rounded: Array = sums.astype(bfloat16)  # before others may write to the buffer
            self.leave_output(None)
            return remaining.form.of(rounded)

    def _to_drain(self) -> HostOutput | None:
        return self._output


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
    """The chain of all passes that were given none. Only the thread that deferred an output receives it."""

    def __init__(self) -> None:
        super().__init__()
        self._thread: weakref.ref[_Thread] | None = None  # whose pass deferred the output
        self._thread_name = ""

    def buffers(self, config: MoEConfig, batch_size: int) -> tuple[BatchBuffers, ...]:
        """Those of all passes of that size."""
        buffers: tuple[BatchBuffers, ...] = KExpertsCPUBuffer.get_buffer(
            batch_size, config.hidden_size, config.num_experts_per_tok
        )
        return buffers

    def receive_output(self, layer_idx: int) -> HostOutput | None:
        """As of any chain.

        Raises
        ------
        RuntimeError
            Also for the deferred output of another thread.
        """
        if self._is_of_another_thread():
            raise RuntimeError(f"layer {layer_idx}: {self._whose()}")
        return super().receive_output(layer_idx)

    def leave_output(self, output: HostOutput | None) -> None:
        """Replace what was received by what this layer leaves, for the same thread."""
        self._thread = None if output is None else weakref.ref(_this_thread())
        self._thread_name = threading.current_thread().name
        self._output = output

    def _to_drain(self) -> HostOutput | None:
        if self._is_of_another_thread() and self._thread is not None and self._thread() is not None:
            raise RuntimeError(f"drain_deferred: {self._whose()}")
        return self._output

    def _is_of_another_thread(self) -> bool:
        return self._output is not None and (self._thread is None or self._thread() is not _this_thread())

    def _whose(self) -> str:
        assert self._output is not None
        assert self._thread is not None
        what = f"a pass that has deferred experts of layer {self._output.output.layer_idx}"
        if self._thread() is None:
            return f"{what} was not drained by thread {self._thread_name!r}, now ended; call drain_deferred()"
        return (
            f"{what} is under way in thread {self._thread_name!r}; threads that run passes side by side, or "
            "hand one over, give every pass a chain=DeferralChain() of its own"
        )
