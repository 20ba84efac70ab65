"""How a forward pass becomes tasks: chunks of tokens, and what is deferred to the next layer."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kt_kernel_ext as ext
from ..arrays.checks import Array
from ..buffers import BufferSlot
from ..config import MoEConfig
from .batch import Batch
from .deferral import Carry, DeferralChain, HostCarry
from .pending import BegunPass, wait_until_done

__all__ = ["LayerRunner"]

#: Of any batch.
_MOST_TOKENS = 2**31 - 1


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
        self.chunk_size = min(chunk_size, _MOST_TOKENS)
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
        )

    def submit_deferring(
        self, batch: Batch, skip_experts: Array | None, begun: BegunPass[Any], chain: DeferralChain
    ) -> None:
        """Queue a batch that begins with what the layer before has deferred and defers some itself.

        What is deferred is no task of the pass: nobody waits for it with the pass.
        """
        with chain.lock:
            self._submit_deferring(batch, skip_experts, begun, chain)

    def _submit_deferring(
        self, batch: Batch, skip_experts: Array | None, begun: BegunPass[Any], chain: DeferralChain
    ) -> None:
        carry = chain.receive(self._config.layer_idx, batch.num_tokens)
        if carry is not None and carry.engine is not self._engine:
            raise RuntimeError(
                f"layer {self._config.layer_idx}: the deferred experts of layer {carry.layer_idx} are left "
                "over from another engine, expected a chain with layers of one"
            )
        if carry is not None and batch.incremental:
            raise ValueError("incremental: got True, but the output begins with the deferred experts")
        _check_ids(batch.ids, self._config.num_experts)
        slot = self._free_slot(chain, batch.num_tokens)
        now, later = self.parts(batch, slot, skip_experts, carry)
        if later:  # the deferred part reads copies: after the sync the caller's arrays are the caller's again
            slot.input[...] = np.asarray(batch.hidden_states)
            slot.weights[...] = np.asarray(batch.weights)

        if carry is not None:
            begun.needs(carry.ticket)
        for task in now:
            slot.busy_until = begun.queue(task)
        left = None
        for task in later:
            slot.busy_until = self._engine.submit(task)
            left = HostCarry(self._config.layer_idx, slot.deferred_output, slot.busy_until, self._engine)
        begun.when_taken_back(lambda: chain.put_back(carry, left))
        chain.leave(left)

    def parts(
        self,
        batch: Batch,
        slot: BufferSlot,
        skip_experts: Array | None,
        carry: Carry | None,
        num_tokens: NDArray[Any] | None = None,
    ) -> tuple[list[ext.Task], list[ext.Task]]:
        """The tasks of what is computed at once, and of what is deferred.

        Parameters
        ----------
        batch : Batch
            The routing is read when the tasks run.
        slot : BufferSlot
            Has the split of the routing; of what is deferred also the input, the weights and the output.
        skip_experts : array of bool [E], optional
        carry : Carry, optional
            What the output begins with.
        num_tokens : array of int64 or int32 [1], optional
            Read when the tasks run: tokens from that number on are computed with no expert.
        """
        c, num_deferred = self._config, self.num_deferred
        split = ext.moe.SlotSplit(
            batch.ids,
            batch.weights,
            slot.immediate_ids,
            slot.deferred_ids,
            c.num_experts,
            num_deferred,
            num_tokens,
        )
        chunks = self._chunks(batch)
        at_once = copy(batch)
        at_once.ids = slot.immediate_ids
        options = {
            "skip_experts": skip_experts,
            "base": None if carry is None else carry.output,
            "split": split,
            "deferred_out": slot.deferred_output if num_deferred else None,
        }
        now = [split.task(), *(self._task(at_once, rows, **options) for rows in chunks)]
        if not num_deferred:
            return now, []
        rest = copy(batch)
        rest.hidden_states, rest.ids, rest.weights = slot.input, slot.deferred_ids, slot.weights
        rest.out, rest.incremental = slot.deferred_output, False
        return now, [self._task(rest, rows, skip_experts=skip_experts, split=split) for rows in chunks]

    def _chunks(self, batch: Batch) -> list[slice]:
        """Rows of each chunk; one empty chunk for an empty batch, so that arguments are always checked."""
        size = self.chunk_size
        num = batch.num_tokens
        return [slice(t, min(t + size, num)) for t in range(0, max(num, 1), size)]

    def _task(self, batch: Batch, rows: slice, **options: Any) -> ext.Task:
        return self._layer.forward_task(
            batch.hidden_states,
            batch.ids,
            batch.weights,
            batch.out,
            batch.incremental,
            first_token=rows.start,
            num_tokens=rows.stop - rows.start,
            **options,
        )

    def _free_slot(self, chain: DeferralChain, batch_size: int) -> BufferSlot:
        """The layer's slot, when no task uses it any more."""
        slots = chain.slots(self._config, batch_size)
        slot = slots[self._config.layer_idx % len(slots)]
        if slot.busy_until is not None and slot.busy_until.number > self._engine.num_completed:
            wait_until_done(self._engine, slot.busy_until)
        return slot


def _check_ids(ids: NDArray[np.int64], num_experts: int) -> None:
    """Raise IndexError for an id of `num_experts` or above.

    Checked before anything is queued: nobody waits for the deferred part by itself, and what the layer before
    has deferred must not be lost with a pass that fails.
    """
    if ids.size and ids.max() >= num_experts:
        t, p = np.argwhere(ids >= num_experts)[0]
        raise IndexError(
            f"topk_ids: got expert {ids[t, p]} at [{t}, {p}], expected ids below {num_experts} "
            "(negative ids are skipped)"
        )
