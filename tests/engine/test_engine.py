"""The engine from Python: order, waiting, exceptions, many threads."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from layers import (
    Batch,
    Layer,
    assert_same_bits,
    batch_taking,
    bf16,
    draw_batch,
    draw_layer,
    engine_of,
    low_level_moe,
)
from low_level_sizes import E, H, I, P, T

from ktmoe_np import kt_kernel_ext as ext

pytestmark = pytest.mark.engine

AnyArray = Any


def fresh_out() -> AnyArray:
    return np.full((T, H), np.nan, bf16)


def bad(batch: Batch, expert: int = E) -> Batch:
    ids = batch.ids.copy()
    ids[0, 0] = expert
    return batch._replace(ids=ids)


# ---- order and waiting ----


def test_tasks_run_in_the_order_of_submission(engine: Any, moe: Any, batch: Batch) -> None:
    layers = [draw_layer(np.random.default_rng(seed), E, I, H) for seed in range(20)]
    outs = [fresh_out() for _ in layers]
    for layer, out in zip(layers, outs, strict=True):
        engine.submit(moe.load_weights_task(*layer.matrices))
        engine.submit(moe.forward_task(*batch, out))
    engine.sync()
    for layer, out in zip(layers, outs, strict=True):
        assert_same_bits(out, layer.forward(batch))


def test_tickets_count_up(engine: Any, moe: Any, batch: Batch) -> None:
    before = engine.num_submitted
    outs = [fresh_out() for _ in range(5)]
    tickets = [engine.submit(moe.forward_task(*batch, out)) for out in outs]
    assert [ticket.number for ticket in tickets] == [before + i for i in range(1, 6)]
    assert repr(tickets[0]) == f"Ticket({before + 1})"
    assert engine.num_submitted == tickets[-1].number
    engine.wait(tickets[-1])
    assert engine.num_completed == tickets[-1].number
    engine.wait(tickets[0])  # done long ago


@pytest.mark.parametrize("allowed", [0, 1, 3, 10, 2**63])
def test_sync_leaves_so_many_pending(
    engine: Any, moe: Any, batch: Batch, expected: AnyArray, allowed: int
) -> None:
    outs = [fresh_out() for _ in range(10)]
    for out in outs:
        engine.submit(moe.forward_task(*batch, out))
    engine.sync(allow_n_pending=allowed)
    assert engine.num_completed >= engine.num_submitted - min(allowed, 10)
    for out in outs[: max(0, 10 - allowed)]:
        assert_same_bits(out, expected)
    engine.sync()
    assert engine.num_completed == engine.num_submitted


def test_sync_with_nothing_submitted() -> None:
    engine = engine_of(1)
    engine.sync()
    engine.sync(5)
    engine.shutdown()


def test_run_is_submit_and_wait(engine: Any, moe: Any, batch: Batch, expected: AnyArray) -> None:
    first, second = fresh_out(), fresh_out()
    engine.submit(moe.forward_task(*batch, first))
    engine.run(moe.forward_task(*batch, second))
    assert_same_bits(first, expected)
    assert_same_bits(second, expected)


@pytest.mark.serial
def test_waiting_lets_other_threads_run_python() -> None:
    layer = draw_layer(np.random.default_rng(2), E, 128, 256)
    batch = batch_taking(0.1, layer, P)
    moe = layer.wrapper(P)
    thread = threading.Thread(target=moe.forward, args=batch)
    thread.start()
    turns = 0
    while thread.is_alive():
        turns += 1
    thread.join()
    assert turns > 100


# ---- exceptions ----


def test_an_exception_comes_out_of_wait(engine: Any, moe: Any, batch: Batch, expected: AnyArray) -> None:
    outs = [fresh_out() for _ in range(3)]
    good, wrong, after = (
        engine.submit(moe.forward_task(*which, out))
        for which, out in zip((batch, bad(batch), batch), outs, strict=True)
    )
    engine.wait(good)
    engine.wait(after)  # only the task's own exception comes out
    for _ in range(2):  # at every call
        with pytest.raises(IndexError, match=f"topk_ids: got expert {E} at"):
            engine.wait(wrong)
    engine.sync()  # has nothing to add
    assert_same_bits(outs[0], expected)
    assert_same_bits(outs[1], fresh_out())
    assert_same_bits(outs[2], expected)


def test_the_first_exception_comes_out_of_sync(engine: Any, moe: Any, batch: Batch) -> None:
    for expert in (E + 1, E + 2):
        engine.submit(moe.forward_task(*bad(batch, expert), fresh_out()))
    with pytest.raises(IndexError, match=f"got expert {E + 1} at"):
        engine.sync()
    engine.sync()
    engine.submit(moe.forward_task(*bad(batch), fresh_out()))
    engine.sync(1)  # does not wait for it, so does not raise it
    with pytest.raises(IndexError, match=f"got expert {E} at"):
        engine.sync()


def test_exceptions_that_nobody_asks_for(engine: Any, moe: Any, batch: Batch, expected: AnyArray) -> None:
    for _ in range(3000):  # more than are kept
        engine.submit(moe.forward_task(*bad(batch), fresh_out()))
    out = fresh_out()
    engine.run(moe.forward_task(*batch, out))
    assert_same_bits(out, expected)


def test_whoever_holds_a_ticket_is_told_of_its_failure(engine: Any, moe: Any, batch: Batch) -> None:
    """More failures than are kept for sync, and others have been told of them before."""
    tickets = [engine.submit(moe.forward_task(*bad(batch, E + i), fresh_out())) for i in range(1100)]
    with pytest.raises(IndexError, match=f"got expert {E} at"):
        engine.sync()
    engine.sync()
    for i, ticket in enumerate(tickets):
        with pytest.raises(IndexError, match=f"got expert {E + i} at"):
            engine.wait(ticket)


def test_a_pass_that_failed_gives_no_result_whoever_syncs_the_engine(layer: Layer, batch: Batch) -> None:
    moe = layer.wrapper(P)
    stop = threading.Event()

    def sync_again_and_again() -> None:
        while not stop.is_set():
            with contextlib.suppress(IndexError):
                moe.cpu_infer.sync()

    thread = threading.Thread(target=sync_again_and_again)
    thread.start()
    try:
        for _ in range(300):
            moe.submit_forward(*bad(batch))
            with pytest.raises(IndexError):
                moe.sync_forward()
            with pytest.raises(IndexError):
                moe.forward(*bad(batch))
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("number", [0, 10**9])
def test_a_number_is_no_ticket(engine: Any, number: int) -> None:
    with pytest.raises(TypeError):
        engine.wait(number)


def test_a_ticket_of_another_engine(engine: Any, moe: Any, layer: Layer, batch: Batch) -> None:
    other = engine_of(1)
    ticket = other.submit(low_level_moe(other, layer, P).forward_task(*batch, fresh_out()))
    with pytest.raises(ValueError, match="ticket: got one of another engine, expected one that submit"):
        engine.wait(ticket)
    other.wait(ticket)


@pytest.mark.parametrize("how", ["run", "submit"])
def test_a_task_is_submitted_once(engine: Any, moe: Any, batch: Batch, expected: AnyArray, how: str) -> None:
    out = fresh_out()
    task = moe.forward_task(*batch, out)
    getattr(engine, how)(task)
    with pytest.raises(ValueError, match="task: was submitted before, expected a new one for every submit"):
        getattr(engine, how)(task)
    engine.sync()
    assert_same_bits(out, expected)


def test_after_a_shutdown(moe: Any, engine: Any, batch: Batch, expected: AnyArray) -> None:
    outs = [fresh_out() for _ in range(20)]
    tickets = [engine.submit(moe.forward_task(*batch, out)) for out in outs]
    engine.shutdown()  # finishes what is queued
    engine.shutdown()
    for ticket, out in zip(tickets, outs, strict=True):
        engine.wait(ticket)
        assert_same_bits(out, expected)
    for call in (engine.run, engine.submit):
        with pytest.raises(RuntimeError, match="the engine has been shut down and takes no more tasks"):
            call(moe.forward_task(*batch, fresh_out()))
    engine.sync()


# ---- many threads ----


def in_threads(work: Callable[[int], None], num: int = 8) -> None:
    """Run `work(i)` in `num` threads that begin together; the first exception comes out."""
    barrier, errors = threading.Barrier(num), []

    def run(i: int) -> None:
        barrier.wait()
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_many_threads_call_one_layer(layer: Layer) -> None:
    moe = layer.wrapper(P)
    batches = [draw_batch(np.random.default_rng(i), layer, 1 + 5 * i, P) for i in range(8)]
    expected = [moe.forward(*batch) for batch in batches]

    def work(i: int) -> None:
        for _ in range(20):
            assert_same_bits(moe.forward(*batches[i]), expected[i])

    in_threads(work)


def test_many_threads_with_layers_of_their_own() -> None:
    layers = [draw_layer(np.random.default_rng(i), E, 16 + 9 * i, 20 + 7 * i) for i in range(8)]
    batches = [draw_batch(np.random.default_rng(i), layer, 9, P) for i, layer in enumerate(layers)]
    expected = [layer.forward(batch) for layer, batch in zip(layers, batches, strict=True)]

    def work(i: int) -> None:
        moe = layers[i].wrapper(P, layer_idx=i)
        for _ in range(10):
            assert_same_bits(moe.forward(*batches[i]), expected[i])
            moe.submit_forward(*batches[i])
            assert_same_bits(moe.sync_forward(), expected[i])

    in_threads(work)


def test_many_threads_submit_to_one_engine(engine: Any, moe: Any, batch: Batch, expected: AnyArray) -> None:
    """Each gets its own exceptions only."""

    def work(i: int) -> None:
        for turn in range(30):
            outs = [fresh_out() for _ in range(3)]
            experts = [None, E + 1 + i, None] if turn % 2 else [None] * 3
            tickets = [
                engine.submit(moe.forward_task(*(batch if expert is None else bad(batch, expert)), out))
                for expert, out in zip(experts, outs, strict=True)
            ]
            numbers = [ticket.number for ticket in tickets]
            assert numbers == sorted(numbers)
            for ticket, expert, out in zip(tickets, experts, outs, strict=True):
                if expert is None:
                    engine.wait(ticket)
                    assert_same_bits(out, expected)
                else:
                    with pytest.raises(IndexError, match=f"got expert {expert} at"):
                        engine.wait(ticket)

    in_threads(work)


def test_two_engines_at_once(layer: Layer, batch: Batch, expected: AnyArray) -> None:
    engines = [engine_of(2), engine_of(1, 1)]
    layers = [low_level_moe(engine, layer, P) for engine in engines]

    def work(i: int) -> None:
        for _ in range(50):
            out = fresh_out()
            engines[i].run(layers[i].forward_task(*batch, out))
            assert_same_bits(out, expected)

    in_threads(work, 2)
    for engine in engines:
        engine.shutdown()


def test_a_layer_outlives_its_engine(layer: Layer, batch: Batch, expected: AnyArray) -> None:
    first, second = engine_of(3), engine_of(1)
    moe = low_level_moe(first, layer, P)
    del first
    gc.collect()
    out = fresh_out()
    try:
        second.run(moe.forward_task(*batch, out))
    except (ValueError, RuntimeError):
        pass
    else:
        assert_same_bits(out, expected)
    second.shutdown()


# ---- what describes an engine ----


def test_what_an_engine_says_of_itself() -> None:
    engine = engine_of(1, 2)
    pool = engine.backend_
    assert (pool.num_threads, pool.num_subpools) == (3, 2)
    assert list(pool.config.subpool_thread_count) == [1, 2]
    pool.config.subpool_thread_count = [9, 9]  # a copy
    assert list(pool.config.subpool_thread_count) == [1, 2]
    engine.shutdown()
    by_number = ext.CPUInfer(3)
    assert by_number.backend_.num_threads == 3
    by_number.shutdown()
    every = ext.WorkerPoolConfig.defaults()
    assert sum(every.subpool_thread_count) == ext.topology()["cpu_quota"]
    assert list(every.subpool_numa_map) == sorted(ext.topology()["node_cpus"])


# ---- copies ----


@pytest.mark.parametrize("size", [0, 1, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 5 << 18])
def test_a_copy_by_all_threads(engine: Any, size: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    to = np.zeros(size, np.uint8)
    assert engine.copy(source, to) is None
    np.testing.assert_array_equal(to, source)


def test_copies_that_cannot_be(engine: Any) -> None:
    source, to = np.zeros((4, 6), np.float32), np.zeros((4, 6), np.float32)
    with pytest.raises(ValueError, match="to: got 72 bytes, expected 96"):
        engine.copy(source, to[:3])
    with pytest.raises(TypeError, match="source: "):
        engine.copy(source[:, :3], to[:2])
    with pytest.raises(ValueError, match="to: "):
        engine.copy(source, source)
    to.setflags(write=False)
    with pytest.raises(ValueError, match="to: got a read-only array"):
        engine.copy(source, to)
