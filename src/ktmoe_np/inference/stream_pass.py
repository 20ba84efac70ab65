"""Forward passes on arrays of a GPU: copied down, computed and copied up in the order of a CUDA stream."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import kt_kernel_ext as ext
from .._arrays import Array, bfloat16
from .._batch import Batch
from .._device import DeviceArray, device_array, new_like, stream_handle
from ..buffers import BufferSlot, KExpertsCPUBuffer
from ..config import MoEConfig
from .runner import LayerRunner

__all__ = ["StreamPass"]


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
        self._begun: tuple[DeviceArray, BufferSlot, tuple[Any, ...]] | None = None

    def submit(
        self, batch: tuple[Any, Any, Any], cuda_stream: Any, skip_experts: Array | None, out: Any
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
        x = device_array(hidden_states, "hidden_states", bfloat16, ("T", c.hidden_size))
        num = x.shape[0]
        ids = device_array(topk_ids, "topk_ids", np.int64, (num, c.num_experts_per_tok))
        weights = device_array(topk_weights, "topk_weights", np.float32, (num, c.num_experts_per_tok))
        target = new_like(hidden_states) if out is None else out
        result = device_array(target, "out", bfloat16, (num, c.hidden_size))
        slots = KExpertsCPUBuffer.get_buffer(num, c.hidden_size, c.num_experts_per_tok, stream)
        slot = slots[c.layer_idx % len(slots)]
        slot.lock_pages()
        on_host = Batch(c, slot.input, slot.immediate_ids, slot.weights, slot.output, incremental=False)
        tasks = self._runner.tasks(on_host, skip_experts)
        for source, to in ((x, slot.input), (ids, slot.immediate_ids), (weights, slot.weights)):
            ext.cuda.copy_to_host(to, source.address, stream)
        for task in tasks:
            self._engine.submit_with_cuda_stream(stream, task, slot.output)
        self._begun = result, slot, (hidden_states, topk_ids, topk_weights)

    def sync(self, cuda_stream: Any) -> Any:
        """Let a stream wait for the pass and copy its result to the device: the array that will have it.

        Raises
        ------
        RuntimeError
            None is pending.
        IndexError
            A pass of a stream has met an expert id of E or above; its result is NaN.
        """
        stream = stream_handle(cuda_stream)
        if self._begun is None:
            where = f"no pass of layer {self._config.layer_idx} is pending in a stream"
            raise RuntimeError(f"sync_forward: {where}, call submit_forward first")
        (result, slot, batch), self._begun = self._begun, None
        try:
            self._engine.sync_with_cuda_stream(stream)
        finally:  # also when it raises what a pass has raised, this one or another: the stream goes on
            ext.cuda.copy_to_device(result.address, slot.output, stream)
            ext.cuda.hold(stream, (result, slot, batch))  # until all has been copied
        return result.owner
