"""Training passes on arrays of a GPU: copied down, computed and copied up in the order of a CUDA stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import kt_kernel_ext as ext
from ..arrays.device import DeviceArray
from ..arrays.types import Array
from ..buffers import KExpertsSFTBuffer, SFTBatchBuffers, StagedMatrices
from ..config import ActivationDtype
from ..passes.stream import Stream, stream_at
from .numbered import NumberedBatch, backward_task, forward_task

if TYPE_CHECKING:
    from .base import BaseSFTMoEWrapper

__all__ = ["DeviceBatch", "stream_backward", "stream_forward"]

_FLOAT32 = np.dtype(np.float32)


class DeviceBatch:
    """The inputs of a pass on a device: contiguous rows, and adapters by name.

    Parameters
    ----------
    hidden_states, ids, weights : DeviceArray
        bfloat16 [T, H], int64 [T, P] and float32 [T, P].
    lora : mapping of str to DeviceArray
        float32 or bfloat16.
    activation_dtype : {"bfloat16", "int8"} or dtype, optional
        None for the layer's own.
    """

    def __init__(
        self,
        hidden_states: DeviceArray,
        ids: DeviceArray,
        weights: DeviceArray,
        lora: Mapping[str, DeviceArray],
        activation_dtype: ActivationDtype | None = None,
    ) -> None:
        self.rows = [hidden_states, ids, weights]
        self.lora = lora
        self.activation_dtype = activation_dtype

    @property
    def arrays(self) -> list[DeviceArray]:
        """All of them, in the order in which they are staged."""
        return [*self.rows, *self.lora.values()]


def stream_forward(
    sft: BaseSFTMoEWrapper, handle: int, batch: DeviceBatch, out: DeviceArray, save: bool
) -> int:
    """Let a stream copy a batch to the host, compute its pass and copy the result back.

    Returns
    -------
    int
        The number of the pass, 0 when it is not saved.

    Raises
    ------
    RuntimeError
        Nothing is loaded, there is no CUDA driver, or it refuses.
    Exception
        The pending exception of earlier passes in streams; their results are NaN.
    """
    number = ext.moe.next_pass_number() if save else 0
    stream = stream_at(sft._streams, handle)
    with stream.order:
        staged = _Staged(sft, stream, batch)
        output = staged.rows.output
        task = forward_task(sft, staged.batch, output, number)
        staged.run(task, output, batch.arrays, [], [output], [out])
    return number


def stream_backward(
    sft: BaseSFTMoEWrapper,
    handle: int,
    batch: DeviceBatch,
    number: int,
    grad_output: DeviceArray,
    results: Sequence[DeviceArray],
) -> None:
    """Let a stream copy the inputs of a pass and its gradient to the host, go back, and copy the results.

    `results` are the gradients of the input and of the routing weights, and those of all adapters, or none.
    Raises what `stream_forward` does.
    """
    stream = stream_at(sft._streams, handle)
    with stream.order:
        staged = _Staged(sft, stream, batch)
        rows, names = staged.rows, list(batch.lora) if len(results) > 2 else []
        gradients: dict[str, Array] = {}
        kept: list[StagedMatrices] = []
        if names:
            shapes = {f"grad_{name}": (batch.lora[name].shape, _FLOAT32) for name in names}
            matrices = _locked(KExpertsSFTBuffer.get_staging(stream.key, shapes))
            gradients, kept = {name: matrices.arrays[f"grad_{name}"] for name in names}, [matrices]
        of_rows = rows.grad_input, rows.grad_weights
        task = backward_task(sft, staged.batch, number, rows.grad_output, of_rows, gradients)
        outputs = [*of_rows, *gradients.values()]
        staged.run(
            task, rows.grad_input, [*batch.arrays, grad_output], [rows.grad_output], outputs, results, kept
        )


class _Staged:
    """The inputs of a pass in pinned memory, which the passes of a stream use in turn."""

    def __init__(self, sft: BaseSFTMoEWrapper, stream: Stream, batch: DeviceBatch) -> None:
        ext.cuda.raise_error()
        self._engine, self._stream, config = sft.cpu_infer, stream, sft.config
        tokens = batch.rows[0].shape[0]
        both: tuple[SFTBatchBuffers, ...] = KExpertsSFTBuffer.get_buffer(
            tokens, config.hidden_size, config.num_experts_per_tok, stream.key
        )
        buffers = both[config.layer_idx % len(both)]
        buffers.lock_pages()
        self._kept: list[object] = [buffers]
        self.rows = buffers.first(tokens)
        lora: dict[str, Array] = {}
        if batch.lora:
            shapes = {name: (array.shape, array.dtype) for name, array in batch.lora.items()}
            matrices = _locked(KExpertsSFTBuffer.get_staging(stream.key, shapes))
            lora = {name: matrices.arrays[name] for name in batch.lora}
            self._kept.append(matrices)
        inputs = self.rows.input, self.rows.ids, self.rows.weights
        self.batch = NumberedBatch(*inputs, lora, batch.activation_dtype)
        self._inputs = [*inputs, *lora.values()]

    def run(
        self,
        task: ext.Task,
        result: Array,
        arrays: Sequence[DeviceArray],
        more_inputs: Sequence[Array],
        outputs: Sequence[Array],
        results: Sequence[DeviceArray],
        kept: Sequence[object] = (),
    ) -> None:
        """Put the pass into the stream, which keeps alive what it needs."""
        stream_pass = ext.cuda.StreamPass(
            self._engine, [*self._inputs, *more_inputs], [(task, result)], list(outputs), 0
        )
        alive = (self._kept, list(kept), list(arrays), list(results))
        addresses = [array.address for array in arrays], [array.address for array in results]
        stream_pass.run(self._stream.handle, *addresses, alive)


def _locked(matrices: StagedMatrices) -> StagedMatrices:
    matrices.lock_pages()
    return matrices
