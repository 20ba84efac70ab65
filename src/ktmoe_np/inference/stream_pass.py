"""Forward passes on arrays of a GPU: copied down, computed and copied up in the order of a CUDA stream."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import kt_kernel_ext as ext
from .._arrays import Array, bfloat16
from .._batch import Batch
from .._device import DeviceArray, device_array, given_back, new_like, stream_handle
from .._dlpack import is_of_jax
from ..buffers import BufferSlot, KExpertsCPUBuffer
from ..config import MoEConfig
from ..deferral import Carry, DeferralChain
from .runner import LayerRunner

__all__ = ["StreamCarry", "StreamPass"]

_INTEGERS = (np.dtype(np.int64), np.dtype(np.int32))


@dataclass(frozen=True)
class StreamCarry(Carry):
    """What a layer left over in a stream."""

    left_by: StreamPass
    like: Any  #: an array such as the result shall be


@dataclass(frozen=True)
class _Begun:
    """A pass between `submit` and `sync`."""

    stream: int
    result: DeviceArray
    slot: BufferSlot
    num_deferred: int  #: tasks that `sync` does not wait for
    arrays: tuple[DeviceArray | None, ...]  #: what is copied down


class StreamPass:
    """One pass of a layer: begun by `submit`, ended by `sync`. Neither waits for the GPU, nor the CPU.

    Parameters
    ----------
    runner : LayerRunner
        Makes the tasks of a batch.
    engine : ext.CPUInfer
    config : MoEConfig
    """

    def __init__(self, runner: LayerRunner, engine: ext.CPUInfer, config: MoEConfig) -> None:
        self._runner, self._engine, self._config = runner, engine, config
        self._begun: _Begun | None = None

    def submit(
        self,
        batch: tuple[Any, Any, Any],
        num_tokens: Any,
        cuda_stream: Any,
        chain: DeferralChain,
        skip_experts: Array | None,
        out: Any,
    ) -> None:
        """Let a stream copy a batch (hidden states, ids, weights) to the host and submit its pass.

        Raises
        ------
        TypeError, ValueError
            An argument of another kind, dtype or shape.
        RuntimeError
            A pass is pending, there is no CUDA driver, or it refuses.
        """
        c, stream = self._config, stream_handle(cuda_stream)
        if self._begun is not None:
            raise RuntimeError(
                f"submit_forward: a pass of layer {c.layer_idx} is pending, call sync_forward first"
            )
        hidden_states, topk_ids, topk_weights = batch
        x = device_array(hidden_states, "hidden_states", [bfloat16], ("T", c.hidden_size), stream)
        routes = x.shape[0], c.num_experts_per_tok
        ids = device_array(topk_ids, "topk_ids", _INTEGERS, routes, stream)
        weights = device_array(topk_weights, "topk_weights", [np.dtype(np.float32)], routes, stream)
        used = None if num_tokens is None else device_array(num_tokens, "num_tokens", _INTEGERS, (1,), stream)
        result = self._result(x, hidden_states, out, stream)
        carry = chain.receive(c.layer_idx, x.shape[0])
        slot = self._free_slot(x.shape[0], stream, carry)

        ids_on_host = _viewed(slot.topk_ids, ids)
        copies = [(x, slot.input), (ids, ids_on_host), (weights, slot.weights)]
        used_on_host = None if used is None else _viewed(slot.num_tokens, used)
        if used is not None:
            copies.append((used, used_on_host))
        on_host = Batch(c, slot.input, slot.topk_ids, slot.weights, slot.output, incremental=False)
        on_host.ids = ids_on_host
        now, later = self._runner.parts(on_host, slot, skip_experts, carry, used_on_host)
        for source, to in copies:
            ext.cuda.copy_to_host(to, source.address, stream)
        results = [(task, slot.output) for task in now] + [(task, slot.deferred_output) for task in later]
        self._engine.submit_all_with_cuda_stream(stream, results)
        chain.leave(StreamCarry(c.layer_idx, slot, 0, self, hidden_states) if later else None)
        self._begun = _Begun(stream, result, slot, len(later), (x, ids, weights, used))
        slot.user = weakref.ref(self)

    def sync(self, cuda_stream: Any) -> Any:
        """Let the stream wait for the pass and copy its result to the device: the array that will have it.

        Raises
        ------
        ValueError
            Another stream.
        RuntimeError
            None is pending.
        IndexError
            A pass of a stream has met an expert id of E or above; its result is NaN.
        """
        stream, begun = stream_handle(cuda_stream), self._begun
        if begun is None:
            where = f"no pass of layer {self._config.layer_idx} is pending in a stream"
            raise RuntimeError(f"sync_forward: {where}, call submit_forward first")
        if stream != begun.stream:
            raise ValueError(f"cuda_stream: got {stream:#x}, expected that of the pass, {begun.stream:#x}")
        self._begun = None
        self._wait_and_copy(begun)
        return given_back(begun.result, stream)

    def drain(self, carry: StreamCarry, cuda_stream: Any, out: Any) -> Any:
        """Copy what this layer has deferred to the device: the array that will have it, rounded."""
        c, slot, stream = self._config, carry.slot, stream_handle(cuda_stream)
        x = device_array(carry.like, "hidden_states", [bfloat16], ("T", c.hidden_size), stream)
        result = self._result(x, carry.like, out, stream)
        on_host = Batch(c, slot.input, slot.topk_ids, slot.weights, slot.output, incremental=False)
        nothing = np.zeros(1, np.int64)  # of the batch is computed: the output is what it begins with
        tasks, _ = self._runner.parts(on_host, slot, None, carry, nothing)
        self._engine.submit_all_with_cuda_stream(stream, [(task, slot.output) for task in tasks])
        self._wait_and_copy(_Begun(stream, result, slot, 0, ()))
        return given_back(result, stream)

    def _result(self, x: DeviceArray, like: Any, out: Any, stream: int) -> DeviceArray:
        if out is not None and is_of_jax(out):
            raise TypeError("out: got an array of JAX, which nobody writes to, expected None")
        target = new_like(like) if out is None else out
        return device_array(target, "out", [bfloat16], x.shape, stream)

    def _wait_and_copy(self, begun: _Begun) -> None:
        stream, slot, result = begun.stream, begun.slot, begun.result
        try:
            self._engine.sync_with_cuda_stream(stream, begun.num_deferred)
        finally:  # also when it raises what a pass has raised, this one or another: the stream goes on
            ext.cuda.copy_to_device(result.address, slot.output, stream)
            ext.cuda.hold(stream, (begun.arrays, result, slot))  # until all has been copied

    def _free_slot(self, num_tokens: int, stream: int, carry: Carry | None) -> BufferSlot:
        """The layer's slot, or the other one when a pass before it is not done with that.

        What was done before in the stream is: a slot is taken when its result has not been copied yet, or the
        output begins with what is deferred in it.
        """
        c = self._config
        slots = KExpertsCPUBuffer.get_buffer(num_tokens, c.hidden_size, c.num_experts_per_tok, stream)
        for i in range(len(slots)):
            slot = slots[(c.layer_idx + i) % len(slots)]
            if not _is_taken(slot) and (carry is None or slot is not carry.slot):
                slot.lock_pages()
                return slot
        raise RuntimeError(
            f"submit_forward: {len(slots)} passes before this one need the stream's buffers, call "
            "sync_forward of one of them first"
        )


def _is_taken(slot: BufferSlot) -> bool:
    user = None if slot.user is None else slot.user()
    return user is not None and user._begun is not None and user._begun.slot is slot


def _viewed(to: Array, source: DeviceArray) -> Array:
    """The beginning of an array, as one of the dtype and shape of another."""
    flat = to.reshape(-1).view(source.dtype)[: int(np.prod(source.shape))]
    viewed: Array = flat.reshape(source.shape)
    return viewed
