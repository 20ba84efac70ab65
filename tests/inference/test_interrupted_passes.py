"""Passes for inference that an exception ends: what was deferred, what is pending, what is loaded.

The moments that matter are a few instructions long, so exceptions are raised by what the package calls there.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from layers import assert_same_bits, draw_batch, draw_layer

from ktmoe_np import DeferralChain, _MoEBase
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.arrays.rows import RowForm
from ktmoe_np.passes.deferral import HostOutput
from ktmoe_np.passes.pending import PendingPass

pytestmark = pytest.mark.kernels

E, I, H, P, T = 6, 16, 24, 3, 5  # noqa: E741


def two_layers(**options: Any) -> tuple[list[Any], Any]:
    """A layer that defers experts, one behind it, and a batch."""
    rng = np.random.default_rng(3)
    layers = [draw_layer(rng, E, I, H) for _ in range(2)]
    moes = [
        layer.wrapper(P, layer_idx=i, max_deferred_experts_per_token=d, **options)
        for i, (layer, d) in enumerate(zip(layers, (2, 0), strict=True))
    ]
    return moes, draw_batch(rng, layers[0], T, P)


def expected(moes: list[Any], batch: Any) -> Any:
    chain = DeferralChain()
    moes[0].forward(*batch, chain=chain)
    return moes[1].forward(*batch, chain=chain)


class Ending(DeferralChain):
    """A chain on which a pass is ended just when it has handed over its deferred output."""

    ends = False

    def leave_output(self, output: Any) -> None:
        super().leave_output(output)
        if self.ends:
            self.ends = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["forward", "submit_forward"])
def test_a_pass_that_was_not_submitted_has_taken_nothing(how: str) -> None:
    moes, batch = two_layers()
    chain = Ending()
    moes[0].forward(*batch, chain=chain)
    chain.ends = True
    with pytest.raises(KeyboardInterrupt):
        getattr(moes[1], how)(*batch, chain=chain)
    assert chain.is_waiting
    assert_same_bits(moes[1].forward(*batch, chain=chain), expected(moes, batch))


def test_a_wait_that_is_ended_leaves_no_pass_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    moes, batch = two_layers()
    chain = DeferralChain()
    moes[0].forward(*batch, chain=chain)

    def end(_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PendingPass, "sync", end)
        with pytest.raises(KeyboardInterrupt):
            moes[1].forward(*batch, chain=chain)
    assert_same_bits(moes[1].forward(*batch, chain=chain), expected(moes, batch))


def test_a_pass_fails_when_what_it_begins_with_has_failed() -> None:
    moes, batch = two_layers()
    moe = moes[0]
    wrong = batch.ids.copy()
    wrong[0, 0] = E
    engine, deferred_output = moe.cpu_infer, np.full((T, H), 12345, np.float32)
    deferring = ext.moe.DeferredPass(
        moe._layer,
        batch.x,
        wrong,
        batch.weights,
        np.zeros_like(batch.x),
        np.empty((T, P), np.int64),
        chunk_size=T,
        num_deferred=2,
        deferred_ids=np.empty((T, P), np.int64),
        deferred_output=deferred_output,
    )
    tickets = [engine.submit(task) for task in deferring.immediate_tasks() + deferring.deferred_tasks()]
    with pytest.raises(IndexError, match=f"topk_ids: got expert {E} at"):
        engine.wait(tickets[0])
    chain = DeferralChain()
    chain.leave_output(HostOutput(deferring.output, tickets[-1], engine, RowForm((T,), np.asarray)))
    with pytest.raises(IndexError, match=f"topk_ids: got expert {E} at"):
        moes[1].forward(*batch, chain=chain)
    with pytest.raises(IndexError, match=f"topk_ids: got expert {E} at"):
        chain.drain()
    assert not chain.is_waiting


class Interrupted:
    """An engine on which waits are ended by what a signal handler raises."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.later: list[Any] = []

    def wait(self, ticket: Any) -> None:
        raise OSError("raised by a handler")

    def run(self, task: Any) -> None:
        self.later.append(task)
        raise OSError("raised by a handler")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def test_a_drain_that_a_handler_ends_can_be_repeated() -> None:
    moes, batch = two_layers()
    chain = DeferralChain()
    moes[0].forward(*batch, chain=chain)
    remaining: Any = chain._output
    engine: Any = Interrupted(remaining.engine)
    chain.leave_output(HostOutput(remaining.output, remaining.ticket, engine, remaining.form))
    with pytest.raises(OSError, match="raised by a handler"):
        chain.drain()
    assert chain.is_waiting


def test_a_pass_that_its_submitter_took_back_has_no_result() -> None:
    moes, batch = two_layers()
    pending = moes[1]._pending
    moes[1].submit_forward(*batch)
    pending._begun.take_back()
    with pytest.raises(
        RuntimeError, match="sync_forward: the call that submitted the pass of layer 1 was ended"
    ):
        moes[1].sync_forward()
    moes[1].forward(*batch)


def test_weights_that_are_loaded_after_an_interrupt_are_known() -> None:
    moes, _ = two_layers()
    layer = draw_layer(np.random.default_rng(4), E, I, H)
    moe = moes[0]
    _MoEBase._loaded.discard(moe)
    engine = moe.cpu_infer
    moe.cpu_infer = Interrupted(engine)
    with pytest.raises(OSError, match="raised by a handler"):
        moe.load_weights_from_tensors(*layer.matrices)
    (task,) = moe.cpu_infer.later
    engine.run(task)
    assert moe in _MoEBase._loaded
    moe.cpu_infer = engine


def test_threads_that_python_has_not_started() -> None:
    """They have one object for all that `threading` says of them, but what they leave is their own."""
    import _thread

    moes, batch = two_layers()
    done: list[Any] = []

    def run_in_foreign_thread(call: Any) -> Any:
        finished = threading.Event()

        def work() -> None:
            try:
                threading.current_thread()
                done.append(call())
            except RuntimeError as error:
                done.append(error)
            finally:
                finished.set()

        _thread.start_new_thread(work, ())
        assert finished.wait(30)
        return done.pop()

    run_in_foreign_thread(lambda: moes[0].forward(*batch))
    refused = run_in_foreign_thread(lambda: moes[1].forward(*batch))
    assert isinstance(refused, RuntimeError)
    assert "deferred experts of layer 0" in str(refused)
    assert moes[0].drain_deferred() is not None
