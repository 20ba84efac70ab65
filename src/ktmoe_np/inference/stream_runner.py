"""Forward passes on arrays of a GPU: copied down, computed and copied up in the order of a CUDA stream."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

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

__all__ = ["StreamBatch", "StreamCarry", "StreamRunner"]

#: What is kept for a slot: with and without a number of tokens, ids of two sizes. Masks come and go.
_MOST_WORKS = 4

_INTEGERS = (np.dtype(np.int64), np.dtype(np.int32))


@dataclass(frozen=True)
class StreamBatch:
    """A batch as a stream has it: arrays on its device."""

    hidden_states: Any
    topk_ids: Any
    topk_weights: Any
    out: Any  #: where to write, None for a new array
    num_tokens: Any  #: how many tokens count, None for all
    skip_experts: Array | None  #: bool [E], on the host


@dataclass(frozen=True)
class StreamCarry(Carry):
    """What a layer left over in a stream."""

    left_by: StreamRunner
    like: Any  #: an array such as the result shall be


class _Pass(NamedTuple):
    """A pass, checked and ready to be put into its stream."""

    stream: int
    work: ext.cuda.StreamPass
    result: DeviceArray
    slot: BufferSlot
    arrays: list[DeviceArray]  #: what is copied down

    @property
    def addresses(self) -> list[int]:
        """Where that is."""
        return [array.address for array in self.arrays]


class StreamRunner:
    """Puts passes of a layer into streams: `run`, or `submit` and `sync`. None waits for the GPU or the CPU.

    Parameters
    ----------
    runner : LayerRunner
        Makes the tasks of a batch.
    engine : ext.CPUInfer
    config : MoEConfig
    """

    def __init__(self, runner: LayerRunner, engine: ext.CPUInfer, config: MoEConfig) -> None:
        self._runner, self._engine, self._config = runner, engine, config
        self._pending: _Pass | None = None
        self._works: weakref.WeakKeyDictionary[BufferSlot, dict[Any, ext.cuda.StreamPass]] = (
            weakref.WeakKeyDictionary()
        )

    def run(self, batch: StreamBatch, cuda_stream: Any, chain: DeferralChain[StreamCarry]) -> Any:
        """Let a stream copy a batch to the host, compute its pass and copy the result back.

        Returns
        -------
        array
            The one that will have the result.

        Raises
        ------
        TypeError, ValueError
            An argument of another kind, dtype or shape.
        RuntimeError
            A pass is pending, there is no CUDA driver, or it refuses.
        Exception
            What passes in streams have raised since somebody asked; their results are NaN. This one has been
            put into the stream then.
        """
        ready = self._ready(batch, cuda_stream, chain)
        ready.work.run(ready.stream, ready.addresses, ready.result.address, ready)
        self._leave(ready, chain)
        ext.cuda.raise_error()
        return given_back(ready.result, ready.stream)

    def submit(self, batch: StreamBatch, cuda_stream: Any, chain: DeferralChain[StreamCarry]) -> None:
        """Let a stream copy a batch to the host and submit its pass; raises what `run` does, but the last."""
        ready = self._ready(batch, cuda_stream, chain)
        ready.work.submit(ready.stream, ready.addresses)
        self._leave(ready, chain)
        self._pending = ready
        ready.slot.user = weakref.ref(self)

    def sync(self, cuda_stream: Any) -> Any:
        """Let the stream wait for the pass and copy its result to the device: the array that will have it.

        Raises
        ------
        ValueError
            Another stream.
        RuntimeError
            None is pending.
        Exception
            As `run`.
        """
        stream, pending = stream_handle(cuda_stream), self._pending
        if pending is None:
            where = f"no pass of layer {self._config.layer_idx} is pending in a stream"
            raise RuntimeError(f"sync_forward: {where}, call submit_forward first")
        if stream != pending.stream:
            raise ValueError(f"cuda_stream: got {stream:#x}, expected that of the pass, {pending.stream:#x}")
        self._pending = None
        pending.work.sync(stream, pending.result.address, pending)
        ext.cuda.raise_error()
        return given_back(pending.result, stream)

    def drain(self, carry: StreamCarry, cuda_stream: Any, out: Any) -> Any:
        """Copy what this layer has deferred to the device: the array that will have it, rounded."""
        c, slot, stream = self._config, carry.slot, stream_handle(cuda_stream)
        x = device_array(carry.like, "hidden_states", [bfloat16], ("T", c.hidden_size), stream)
        result = self._result(x, carry.like, out, stream)
        none = np.zeros(1, np.int64)  # no token counts: the output is the carry alone
        batch = Batch(c, slot.input, slot.topk_ids, slot.weights, slot.output, incremental=False)
        tasks, _ = self._runner.parts(batch, slot, None, carry, none)
        work = ext.cuda.StreamPass(self._engine, [], [(task, slot.output) for task in tasks], slot.output, 0)
        work.run(stream, [], result.address, (result, slot))
        return given_back(result, stream)

    # ---- what is ready to be put into a stream ----

    def _ready(self, batch: StreamBatch, cuda_stream: Any, chain: DeferralChain[StreamCarry]) -> _Pass:
        """The pass of a batch; nothing has changed when an argument is refused."""
        c, stream = self._config, stream_handle(cuda_stream)
        if self._pending is not None:
            raise RuntimeError(
                f"a pass of layer {c.layer_idx} is pending in a stream, call sync_forward first"
            )
        x = device_array(batch.hidden_states, "hidden_states", [bfloat16], ("T", c.hidden_size), stream)
        routes = x.shape[0], c.num_experts_per_tok
        ids = device_array(batch.topk_ids, "topk_ids", _INTEGERS, routes, stream)
        weights = device_array(batch.topk_weights, "topk_weights", [np.dtype(np.float32)], routes, stream)
        arrays = [x, ids, weights]
        if batch.num_tokens is not None:
            arrays.append(device_array(batch.num_tokens, "num_tokens", _INTEGERS, (1,), stream))
        result = self._result(x, batch.hidden_states, batch.out, stream)
        carry = chain.receive(c.layer_idx, x.shape[0])
        slot = self._free_slot(x.shape[0], stream, carry)
        work = self._work(slot, ids.dtype, carry, batch.skip_experts, *arrays[3:])
        return _Pass(stream, work, result, slot, arrays)

    def _leave(self, ready: _Pass, chain: DeferralChain[StreamCarry]) -> None:
        """Leave to the chain what the pass defers."""
        left = None
        if self._runner.num_deferred:
            left = StreamCarry(self._config.layer_idx, ready.slot, self, ready.arrays[0].owner)
        chain.leave(left)

    def _work(
        self,
        slot: BufferSlot,
        ids_dtype: np.dtype[Any],
        carry: Carry | None,
        skip_experts: Array | None,
        used: DeviceArray | None = None,
    ) -> ext.cuda.StreamPass:
        """A pass from and to a slot, made when it is first needed.

        What it is made of is known by its arrays, which it holds as long as it is known.
        """
        base = None if carry is None else carry.slot.deferred_output
        key = ids_dtype, None if used is None else used.dtype, id(base), id(skip_experts)
        works = self._works.setdefault(slot, {})
        if key in works:
            return works[key]
        while len(works) >= _MOST_WORKS:
            del works[next(iter(works))]
        ids = _viewed(slot.topk_ids, ids_dtype)
        inputs, number = [slot.input, ids, slot.weights], None
        if used is not None:
            number = _viewed(slot.num_tokens, used.dtype)
            inputs.append(number)
        works[key] = work = self._new_work(slot, ids, number, carry, skip_experts, inputs)
        return work

    def _new_work(
        self,
        slot: BufferSlot,
        ids: Array,
        number: Array | None,
        carry: Carry | None,
        skip_experts: Array | None,
        inputs: list[Array],
    ) -> ext.cuda.StreamPass:
        batch = Batch(self._config, slot.input, slot.topk_ids, slot.weights, slot.output, incremental=False)
        batch.ids = ids
        now, later = self._runner.parts(batch, slot, skip_experts, carry, number)
        tasks = [(task, slot.output) for task in now] + [(task, slot.deferred_output) for task in later]
        return ext.cuda.StreamPass(self._engine, inputs, tasks, slot.output, len(later))

    def _result(self, x: DeviceArray, like: Any, out: Any, stream: int) -> DeviceArray:
        if out is not None and is_of_jax(out):
            raise TypeError("out: got an array of JAX, which nobody writes to, expected None")
        target = new_like(like) if out is None else out
        return device_array(target, "out", [bfloat16], x.shape, stream)

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
            f"{len(slots)} passes before this one need the stream's buffers, call sync_forward of one of "
            "them first"
        )


def _is_taken(slot: BufferSlot) -> bool:
    user = None if slot.user is None else slot.user()
    return user is not None and user._pending is not None and user._pending.slot is slot


def _viewed(to: Array, dtype: np.dtype[Any]) -> Array:
    """The beginning of an array as one of another dtype, of the same shape."""
    viewed: Array = to.reshape(-1).view(dtype)[: to.size].reshape(to.shape)
    return viewed
