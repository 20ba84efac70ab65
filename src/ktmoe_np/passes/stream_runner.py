"""Forward passes on arrays of a GPU: copied down, computed and copied up in the order of a CUDA stream."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import kt_kernel_ext as ext
from ..arrays.checks import Array, bfloat16
from ..arrays.device import DeviceArray, cast_array, device_array, given_back, new_like
from ..arrays.host import check_not_differentiated
from ..arrays.library import is_of
from ..arrays.rows import HIDDEN_DTYPES
from ..arrays.spec import ArraySpec
from ..buffers import BatchBuffers
from ..config import MoEConfig
from .batch import Batch
from .deferral import LayerOutput
from .host import LayerRunner
from .stream import Stream, StreamOutput

__all__ = ["StreamBatch", "StreamRunner", "drain"]

#: What is kept for buffers: batches of a few sizes. Masks, and layers before that defer, come and go.
_MAX_PREPARED = 8

_INTEGERS = (np.dtype(np.int64), np.dtype(np.int32))
_FLOAT32 = (np.dtype(np.float32),)
#: What a library casts on the device.
_OTHER_HIDDEN = tuple(dtype.name for dtype in HIDDEN_DTYPES[1:])
_NARROW_INTEGERS, _OTHER_FLOATS = ("int8", "int16", "uint8"), ("float64", "float16", "bfloat16")
_NUMBER = ArraySpec(_INTEGERS, (1,))


@dataclass(frozen=True)
class StreamBatch:
    """A batch as a stream has it: arrays on its device."""

    hidden_states: Any
    topk_ids: Any
    topk_weights: Any
    out: Any  #: where to write, None for a new array
    num_tokens: Any  #: how many tokens count, None for all
    skip_experts: Array | None  #: bool [E], on the host
    activation_dtype: str | None  #: None for the layer's


class _PreparedPass(NamedTuple):
    """The work in the stream, from and to the first rows of staging buffers."""

    stream_pass: ext.cuda.StreamPass
    received: LayerOutput | None  #: what it begins with
    output: ext.moe.DeferredOutput | None  #: what it leaves for the next layer


class _Pass(NamedTuple):
    """A pass, checked and ready to be put into its stream."""

    prepared: _PreparedPass
    result: DeviceArray
    buffers: BatchBuffers
    received: StreamOutput | None
    arrays: list[DeviceArray]  #: what is copied down

    @property
    def addresses(self) -> list[int]:
        """Its address."""
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
        self._hidden = ArraySpec((bfloat16,), ("...", config.hidden_size))
        self._lock = ext.CallLock("cuda_stream", of_engine=True)  # of `_pending`: streams are many
        self._pending: tuple[Stream, _Pass] | None = None
        self._prepared: weakref.WeakKeyDictionary[BatchBuffers, dict[Any, _PreparedPass]] = (
            weakref.WeakKeyDictionary()
        )

    def run(self, batch: StreamBatch, stream: Stream) -> Any:
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
            The pending exception of earlier passes in streams; their results are NaN.
        """
        with stream.order, self._lock:
            ready = self._ready(batch, stream)
            ready.prepared.stream_pass.run(stream.handle, ready.addresses, [ready.result.address], ready)
            self._leave(ready, stream)
            return given_back(ready.result, stream.handle)

    def submit(self, batch: StreamBatch, stream: Stream) -> None:
        """Let a stream copy a batch to the host and submit its pass; raises what `run` does."""
        with stream.order, self._lock:
            ready = self._ready(batch, stream)
            ready.prepared.stream_pass.submit(stream.handle, ready.addresses, ready)
            self._leave(ready, stream)
            self._pending = stream, ready
            stream.pending.add(self)

    def sync(self, stream: Stream) -> Any:
        """Let the stream wait for the pass and copy its result to the device: the array that will have it.

        Raises
        ------
        ValueError
            Another stream.
        RuntimeError
            None is pending, or the driver refuses.
        Exception
            As `run`, but when the stream has been told all.
        """
        with stream.order, self._lock:
            if self._pending is None:
                where = f"no pass of layer {self._config.layer_idx} is pending in a stream"
                raise RuntimeError(f"sync_forward: {where}, call submit_forward first")
            submitted_to, ready = self._pending
            if submitted_to is not stream:
                expected = f"expected that of the pass, {submitted_to.handle:#x}"
                raise ValueError(f"cuda_stream: got {stream.handle:#x}, {expected}")
            self._pending = None
            ready.prepared.stream_pass.sync(stream.handle, [ready.result.address], ready)
            ext.cuda.raise_error()
            return given_back(ready.result, stream.handle)

    def buffers_in_use(self) -> list[BatchBuffers]:
        """The buffers of a pass that was submitted, and of what it begins with."""
        if self._pending is None:
            return []
        _, ready = self._pending
        return [ready.buffers] if ready.received is None else [ready.buffers, ready.received.buffers]

    def drain(self, remaining: StreamOutput, stream: Stream, out: Any) -> Any:
        """Copy what this layer has deferred to the device: the array that will have it, rounded."""
        if any(buffers is remaining.buffers for buffers in self.buffers_in_use()):
            raise RuntimeError(
                f"a pass of layer {self._config.layer_idx} is pending in the stream, call sync_forward first"
            )
        num_tokens = remaining.output.num_tokens
        rounded = remaining.buffers.output[:num_tokens]
        result = self._result(remaining.like, remaining.lead, out, stream.handle)
        tasks = [(remaining.output.rounding_task(rounded), rounded)]
        stream_pass = ext.cuda.StreamPass(self._engine, [], tasks, [rounded], 0)
        stream_pass.run(stream.handle, [], [result.address], (result, remaining))
        return given_back(result, stream.handle)

    # ---- what is ready to be put into a stream ----

    def _ready(self, batch: StreamBatch, stream: Stream) -> _Pass:
        """The pass of a batch; nothing has changed when an argument is refused."""
        ext.cuda.raise_error()
        c, handle = self._config, stream.handle
        if self._pending is not None:
            raise RuntimeError(
                f"a pass of layer {c.layer_idx} is pending in a stream, call sync_forward first"
            )
        for name in ("hidden_states", "topk_weights"):
            check_not_differentiated(getattr(batch, name), name)
        given = cast_array(batch.hidden_states, bfloat16, _OTHER_HIDDEN, handle)
        x = device_array(given, "hidden_states", self._hidden, handle)
        lead = x.shape[:-1]
        routes = *lead, c.num_experts_per_tok
        given_ids = cast_array(batch.topk_ids, _INTEGERS[0], _NARROW_INTEGERS, handle)
        ids = device_array(given_ids, "topk_ids", ArraySpec(_INTEGERS, routes), handle)
        given_weights = cast_array(batch.topk_weights, _FLOAT32[0], _OTHER_FLOATS, handle)
        weights = device_array(given_weights, "topk_weights", ArraySpec(_FLOAT32, routes), handle)
        arrays = [x, ids, weights]
        if batch.num_tokens is not None:
            arrays.append(device_array(batch.num_tokens, "num_tokens", _NUMBER, handle))
        result = self._result(given, lead, batch.out, handle)
        received = stream.chain.receive_output(c.layer_idx)
        buffers = stream.free_buffers(c, math.prod(lead), received)
        prepared = self._prepared_pass(buffers, received, batch, arrays)
        return _Pass(prepared, result, buffers, received, arrays)

    def _leave(self, ready: _Pass, stream: Stream) -> None:
        """Leave the pass's deferred output to the stream's chain."""
        carried = None
        if ready.prepared.output is not None:
            x = ready.arrays[0]
            carried = StreamOutput(ready.prepared.output, ready.buffers, self, x.owner, x.shape[:-1])
        stream.chain.leave_output(carried)

    def _prepared_pass(
        self,
        buffers: BatchBuffers,
        received: LayerOutput | None,
        there: StreamBatch,
        arrays: list[DeviceArray],
    ) -> _PreparedPass:
        """The prepared pass, created at first use.

        The key contains ids of objects, which the prepared pass keeps alive.
        """
        num_tokens = math.prod(arrays[0].shape[:-1])
        begins_with = None if received is None else id(received.output)
        options = id(there.skip_experts), there.activation_dtype
        key = num_tokens, tuple(array.dtype for array in arrays), begins_with, *options
        prepared = self._prepared.setdefault(buffers, {})
        if key not in prepared:
            while len(prepared) >= _MAX_PREPARED:
                del prepared[next(iter(prepared))]
            prepared[key] = self._prepare_pass(buffers.first(num_tokens), received, there, arrays)
        return prepared[key]

    def _prepare_pass(
        self,
        buffers: BatchBuffers,
        received: LayerOutput | None,
        there: StreamBatch,
        arrays: list[DeviceArray],
    ) -> _PreparedPass:
        dtypes = [array.dtype for array in arrays]
        batch = Batch(
            self._config,
            buffers.input,
            buffers.topk_ids,
            buffers.weights,
            buffers.output,
            incremental=False,
            activation_dtype=there.activation_dtype,
        )
        batch.ids = _viewed(buffers.topk_ids, dtypes[1])
        number = _viewed(buffers.num_tokens, dtypes[3]) if len(dtypes) > 3 else None
        inputs = [buffers.input, batch.ids, buffers.weights] + ([] if number is None else [number])
        deferring = self._runner.deferred_pass(batch, buffers, there.skip_experts, received, number)
        now, later = deferring.immediate_tasks(), deferring.deferred_tasks()
        tasks = [(task, buffers.output) for task in now] + [(task, buffers.deferred_output) for task in later]
        stream_pass = ext.cuda.StreamPass(self._engine, inputs, tasks, [buffers.output], len(later))
        return _PreparedPass(stream_pass, received, deferring.output)

    def _result(self, like: Any, lead: tuple[int, ...], out: Any, stream: int) -> DeviceArray:
        if out is not None and is_of("JAX", out):
            raise TypeError("out: got a JAX array, which cannot be written, expected None")
        target = new_like(like) if out is None else out
        return device_array(target, "out", ArraySpec((bfloat16,), (*lead, self._config.hidden_size)), stream)


def drain(stream: Stream, out: Any) -> Any:
    """The deferred output of the last layer in a stream, or None; see `BaseMoEWrapper.drain_deferred`."""
    with stream.order:
        ext.cuda.raise_error()
        remaining = stream.chain.take_output()
        if remaining is None:
            return None
        try:
            return remaining.runner.drain(remaining, stream, out)
        except Exception:  # it is still to be drained
            stream.chain.leave_output(remaining)
            raise


def _viewed(to: Array, dtype: np.dtype[Any]) -> Array:
    """The beginning of an array as one of another dtype, of the same shape."""
    viewed: Array = to.reshape(-1).view(dtype)[: to.size].reshape(to.shape)
    return viewed
