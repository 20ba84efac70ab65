"""Forward passes on the host: their tasks, and the chain that takes deferred experts to the next layer."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from .. import kt_kernel_ext as ext
from ..arrays.checks import Array
from ..buffers import BatchBuffers
from ..config import MoEConfig
from .batch import Batch
from .deferral import DeferralChain, HostOutput, LayerOutput
from .pending import BegunPass, wait_until_done

__all__ = ["LayerRunner"]

#: Of any batch.
_MAX_TOKENS = 2**31 - 1


class LayerRunner:
    """Runs batches on a layer of the engine.

    Parameters
    ----------
    layer : ext.moe.MoE_Interface
        The layer.
    engine : ext.CPUInfer
        The engine it was made on.
    config : MoEConfig
        Its sizes.
    chunk_size : int
        Tokens that a task takes at most.
    num_deferred : int
        Experts of each token that are deferred to the next layer.
    """

    def __init__(
        self,
        layer: ext.moe.MoE_Interface,
        engine: ext.CPUInfer,
        config: MoEConfig,
        chunk_size: int,
        num_deferred: int,
    ) -> None:
        self._layer = layer
        self._engine = engine
        self._config = config
        self.chunk_size = min(chunk_size, _MAX_TOKENS)
        self.num_deferred = num_deferred

    def defers(self, chain: DeferralChain) -> bool:
        """Whether a pass now takes part in the chain of deferred experts."""
        return self.num_deferred > 0 or chain.is_waiting

    def run(self, batch: Batch, skip_experts: Array | None) -> None:
        """Compute a batch in the calling thread and the workers; Ctrl-C gets through between chunks."""
        self._engine.run(self._tasks(batch, skip_experts))

    def submit(self, batch: Batch, skip_experts: Array | None, begun: BegunPass[Any]) -> None:
        """Queue a batch. Nothing is queued when an argument is refused."""
        for task in self._tasks(batch, skip_experts):
            begun.queue(task)

    def _tasks(self, batch: Batch, skip_experts: Array | None) -> list[ext.Task]:
        """A task for each chunk."""
        return self._layer.forward_tasks(
            batch.hidden_states,
            batch.ids,
            batch.weights,
            batch.out,
            self.chunk_size,
            batch.incremental,
            skip_experts=skip_experts,
            activation_dtype=batch.activation_dtype,
            adapters=batch.adapters,
        )

    def submit_deferring(
        self, batch: Batch, skip_experts: Array | None, begun: BegunPass[Any], chain: DeferralChain
    ) -> None:
        """Queue a batch that adds deferred experts of the previous layer and defers some itself.

        The deferred part is no task of the pass: waiting for the pass does not wait for it.
        """
        with chain.lock:
            self._submit_deferring(batch, skip_experts, begun, chain)

    def _submit_deferring(
        self, batch: Batch, skip_experts: Array | None, begun: BegunPass[Any], chain: DeferralChain
    ) -> None:
        received = chain.receive_output(self._config.layer_idx)
        if received is not None and received.engine is not self._engine:
            raise RuntimeError(
                f"layer {self._config.layer_idx}: the deferred experts of layer {received.output.layer_idx} "
                "are left over from another engine, expected a chain with layers of one"
            )
        buffers = self._free_buffers(chain, batch.num_tokens)
        # Ids are checked before anything is queued: no call waits for the deferred part. That part reads
        # copies: after the sync the caller may write to its arrays again.
        deferring = self.deferred_pass(batch, buffers, skip_experts, received, copies=True)
        deferring.check_ids()
        immediate, deferred = deferring.immediate_tasks(), deferring.deferred_tasks()

        if received is not None:  # a failure of that is told by this pass, and by no later sync
            begun.needs(received.ticket)
        for task in immediate:
            buffers.busy_until = begun.queue(task)
        carried = None
        for task in deferred:
            buffers.busy_until = self._engine.submit(task)
        if deferring.output is not None:
            assert buffers.busy_until is not None
            carried = HostOutput(deferring.output, buffers.busy_until, self._engine, batch.form)
        begun.when_taken_back(lambda: chain.put_back(received, carried))
        chain.leave_output(carried)

    def deferred_pass(
        self,
        batch: Batch,
        buffers: BatchBuffers,
        skip_experts: Array | None,
        received: LayerOutput | None,
        num_tokens: NDArray[Any] | None = None,
        *,
        copies: bool = False,
    ) -> ext.moe.DeferredPass:
        """The pass of a batch that receives a deferred output, leaves one, or both.

        Parameters
        ----------
        batch : Batch
            Read when the tasks run.
        buffers : BatchBuffers
            Have the split of the routing and the deferred output.
        skip_experts : array of bool [E], optional
        received : LayerOutput, optional
            What the output begins with.
        num_tokens : array of int64 or int32 [1], optional
            Read when the tasks run: tokens from that number on are computed with no expert.
        copies : bool
            Whether the deferred part reads copies of hidden states and weights, which are in the buffers.
        """
        deferring: dict[str, Any] = {}
        if self.num_deferred:
            deferring = {"deferred_ids": buffers.deferred_ids, "deferred_output": buffers.deferred_output}
        if self.num_deferred and copies:
            deferring |= {"copied_hidden_states": buffers.input, "copied_weights": buffers.weights}
        return ext.moe.DeferredPass(
            self._layer,
            batch.hidden_states,
            batch.ids,
            batch.weights,
            batch.out,
            buffers.immediate_ids,
            chunk_size=self.chunk_size,
            num_deferred=self.num_deferred,
            received=None if received is None else received.output,
            incremental=batch.incremental,
            skip_experts=skip_experts,
            num_tokens=num_tokens,
            activation_dtype=batch.activation_dtype,
            adapters=batch.adapters,
            **deferring,
        )

    def _free_buffers(self, chain: DeferralChain, batch_size: int) -> BatchBuffers:
        """The layer's buffers, when no task uses them any more."""
        in_turn = chain.buffers(self._config, batch_size)
        buffers = in_turn[self._config.layer_idx % len(in_turn)]
        if buffers.busy_until is not None and buffers.busy_until.number > self._engine.num_completed:
            wait_until_done(self._engine, buffers.busy_until)
        return buffers
