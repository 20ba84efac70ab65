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

__all__ = ["StreamCarry", "StreamPass"]

#: Passes of a slot that are kept, for masks and layers before that come and go.
_MOST_PASSES = 4

_INTEGERS = (np.dtype(np.int64), np.dtype(np.int32))


@dataclass(frozen=True)
class StreamCarry(Carry):
    """What a layer left over in a stream."""

    left_by: StreamPass
    like: Any  #: an array such as the result shall be


class _Begun(NamedTuple):
    """A pass between `submit` and `sync`."""

    stream: int
    work: ext.cuda.StreamPass
    result: DeviceArray
    slot: BufferSlot
    arrays: list[DeviceArray]  #: what is copied down

    @property
    def addresses(self) -> list[int]:
        """Where that is."""
        return [array.address for array in self.arrays]


class StreamPass:
    """Passes of a layer: `run`, or begun by `submit` and ended by `sync`. None waits for the GPU or the CPU.

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
        self._passes: weakref.WeakKeyDictionary[BufferSlot, dict[Any, ext.cuda.StreamPass]] = (
            weakref.WeakKeyDictionary()
        )

    def submit(self, *batch: Any, **options: Any) -> None:
        """Let a stream copy a batch to the host and submit its pass; see `run`."""
        begun = self._begin(*batch, **options)
        begun.work.submit(begun.stream, begun.addresses)
        self._leave(begun, options["chain"])
        self._begun = begun
        begun.slot.user = weakref.ref(self)

    def run(self, *batch: Any, **options: Any) -> Any:
        """Let a stream copy a batch to the host, compute its pass and copy the result back.

        Parameters
        ----------
        *batch : arrays
            Hidden states, ids and weights.
        **options
            cuda_stream; `chain`, the stream's; and, or None: `num_tokens` and `out`, on the device, and
            `skip_experts`.

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
        IndexError
            A pass of a stream has met an expert id of E or above; its result is NaN.
        """
        begun = self._begin(*batch, **options)
        self._leave(begun, options["chain"])
        begun.work.run(begun.stream, begun.addresses, begun.result.address, begun)
        return given_back(begun.result, begun.stream)

    def _begin(
        self,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        *,
        num_tokens: Any,
        cuda_stream: Any,
        chain: DeferralChain,
        skip_experts: Array | None,
        out: Any,
    ) -> _Begun:
        c, stream = self._config, stream_handle(cuda_stream)
        if self._begun is not None:
            raise RuntimeError(
                f"submit_forward: a pass of layer {c.layer_idx} is pending, call sync_forward first"
            )
        x = device_array(hidden_states, "hidden_states", [bfloat16], ("T", c.hidden_size), stream)
        routes = x.shape[0], c.num_experts_per_tok
        ids = device_array(topk_ids, "topk_ids", _INTEGERS, routes, stream)
        weights = device_array(topk_weights, "topk_weights", [np.dtype(np.float32)], routes, stream)
        arrays = [x, ids, weights]
        if num_tokens is not None:
            arrays.append(device_array(num_tokens, "num_tokens", _INTEGERS, (1,), stream))
        result = self._result(x, hidden_states, out, stream)
        carry = chain.receive(c.layer_idx, x.shape[0])
        slot = self._free_slot(x.shape[0], stream, carry)
        work = self._work(slot, ids.dtype, carry, skip_experts, *arrays[3:])
        return _Begun(stream, work, result, slot, arrays)

    def _leave(self, begun: _Begun, chain: DeferralChain) -> None:
        """Leave to the chain what the pass defers."""
        left = None
        if self._runner.num_deferred:
            left = StreamCarry(self._config.layer_idx, begun.slot, 0, self, begun.arrays[0].owner)
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
        passes = self._passes.setdefault(slot, {})
        if key in passes:
            return passes[key]
        while len(passes) >= _MOST_PASSES:
            del passes[next(iter(passes))]
        ids = _viewed(slot.topk_ids, ids_dtype)
        inputs, number = [slot.input, ids, slot.weights], None
        if used is not None:
            number = _viewed(slot.num_tokens, used.dtype)
            inputs.append(number)
        passes[key] = work = self._new_work(slot, ids, number, carry, skip_experts, inputs)
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
        begun.work.sync(stream, begun.result.address, begun)
        return given_back(begun.result, stream)

    def drain(self, carry: StreamCarry, cuda_stream: Any, out: Any) -> Any:
        """Copy what this layer has deferred to the device: the array that will have it, rounded."""
        c, slot, stream = self._config, carry.slot, stream_handle(cuda_stream)
        x = device_array(carry.like, "hidden_states", [bfloat16], ("T", c.hidden_size), stream)
        result = self._result(x, carry.like, out, stream)
        nothing = np.zeros(1, np.int64)  # of the batch is computed: the output is what it begins with
        batch = Batch(c, slot.input, slot.topk_ids, slot.weights, slot.output, incremental=False)
        tasks, _ = self._runner.parts(batch, slot, None, carry, nothing)
        work = ext.cuda.StreamPass(self._engine, [], [(task, slot.output) for task in tasks], slot.output, 0)
        work.run(stream, [], result.address, (result, slot))
        return given_back(result, stream)

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
            f"submit_forward: {len(slots)} passes before this one need the stream's buffers, call "
            "sync_forward of one of them first"
        )


def _is_taken(slot: BufferSlot) -> bool:
    user = None if slot.user is None else slot.user()
    return user is not None and user._begun is not None and user._begun.slot is slot


def _viewed(to: Array, dtype: np.dtype[Any]) -> Array:
    """The beginning of an array as one of another dtype, of the same shape."""
    viewed: Array = to.reshape(-1).view(dtype)[: to.size].reshape(to.shape)
    return viewed
