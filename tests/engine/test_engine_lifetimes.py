"""Objects are kept alive as long as needed, and nothing is left then: arrays, threads, memory, CPU time."""

from __future__ import annotations

import gc
import os
import sys
import time
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from layers import (
    IS_SLOW,
    Batch,
    Layer,
    assert_same_bits,
    bf16,
    draw_layer,
    engine_of,
    low_level_moe,
)
from low_level_sizes import E, H, P, T

from ktmoe_np import kt_kernel_ext as ext

pytestmark = [pytest.mark.engine, pytest.mark.asan]

AnyArray = Any


def fresh_out() -> AnyArray:
    return np.full((T, H), np.nan, bf16)


def bad(batch: Batch, expert: int = E) -> Batch:
    ids = batch.ids.copy()
    ids[0, 0] = expert
    return batch._replace(ids=ids)


def test_a_submitted_task_holds_its_arrays(engine: Any, moe: Any, batch: Batch, expected: AnyArray) -> None:
    outs, inputs = [], []
    for _ in range(50):
        copies = Batch(*(array.copy() for array in batch))
        out = fresh_out()
        engine.submit(moe.forward_task(*copies, out))
        outs.append(out)
        inputs += [weakref.ref(array) for array in copies]
        del copies
        np.full((T, H), np.nan, bf16)  # takes the place of what was freed too early
    assert all(ref() is not None for ref in inputs[-3:])  # no call has reached the engine since
    engine.sync()
    gc.collect()
    assert all(ref() is None for ref in inputs)
    for out in outs:
        assert_same_bits(out, expected)


def test_an_output_is_held_too(engine: Any, moe: Any, batch: Batch) -> None:
    out = fresh_out()
    ref = weakref.ref(out)
    ticket = engine.submit(moe.forward_task(*batch, out))
    del out
    assert ref() is not None
    engine.wait(ticket)
    assert ref() is None


def test_a_failed_task_lets_go(engine: Any, moe: Any, batch: Batch) -> None:
    out = fresh_out()
    ref = weakref.ref(out)
    with pytest.raises(IndexError):
        engine.run(moe.forward_task(*bad(batch), out))
    del out
    gc.collect()
    assert ref() is None


def test_a_task_that_is_never_submitted_lets_go(moe: Any, batch: Batch) -> None:
    out = fresh_out()
    ref = weakref.ref(out)
    task = moe.forward_task(*batch, out)
    del out
    assert ref() is not None
    del task
    assert ref() is None


class Linked(np.ndarray):
    """An array that can refer to something."""

    other: Any = None


def linked(*shape: int, dtype: Any = bf16) -> Any:
    return np.zeros(shape, dtype).view(Linked)


def tasks_of(engine: Any, layer: Layer, batch: Batch) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Tasks, each with an array that it holds."""
    moe = low_level_moe(engine, layer, P)

    def forward() -> tuple[Any, Any]:
        out = linked(T, H)
        return moe.forward_task(*batch, out), out

    def forward_from_ids() -> tuple[Any, Any]:
        ids = linked(T, P, dtype=np.int64)
        return moe.forward_task(batch.x, ids, batch.weights, fresh_out()), ids

    def load() -> tuple[Any, Any]:
        gate = np.asarray(layer.gate_proj).view(Linked)
        return moe.load_weights_task(gate, layer.up_proj, layer.down_proj), gate

    def quantize() -> tuple[Any, Any]:
        weights = linked(3, 64)
        codes, scale = np.empty((3, 64), np.uint8), np.empty(3, np.float32)
        return ext.quantize_task("int8", weights, codes, scale, pool=engine.backend_), weights

    def chunk() -> tuple[Any, Any]:
        out = linked(T, H)
        return moe.forward_tasks(*batch, out, 1)[0], out

    def deferring() -> tuple[Any, Any]:
        ids = linked(T, P, dtype=np.int64)
        scratch = np.empty((T, P), np.int64)
        return ext.moe.DeferredPass(moe, batch.x, ids, batch.weights, fresh_out(), scratch, chunk_size=T), ids

    return {f.__name__: f for f in (forward, forward_from_ids, load, quantize, chunk, deferring)}


@pytest.mark.parametrize("name", ["forward", "forward_from_ids", "load", "quantize", "chunk", "deferring"])
def test_a_task_in_a_cycle_with_its_array_is_collected(
    engine: Any, layer: Layer, batch: Batch, name: str
) -> None:
    """A task that is never submitted."""
    task, array = tasks_of(engine, layer, batch)[name]()
    array.other = task
    ref = weakref.ref(array)
    gc.collect()
    assert array.other is task  # in use: the collector must not touch it
    del task, array
    assert ref() is not None
    gc.collect()
    assert ref() is None


def test_a_submitted_pass_of_a_wrapper_holds_its_arrays(
    layer: Layer, batch: Batch, expected: AnyArray
) -> None:
    moe = layer.wrapper(P)
    copies = Batch(*(array.copy() for array in batch))
    refs = [weakref.ref(array) for array in copies]
    moe.submit_forward(*copies)
    del copies
    assert all(ref() is not None for ref in refs)
    assert_same_bits(moe.sync_forward(), expected)
    assert all(ref() is None for ref in refs)


def test_weights_live_as_long_as_the_layer(
    engine: Any, batch: Batch, expected: AnyArray, layer: Layer
) -> None:
    own = layer.with_matrices(np.copy)
    refs = [weakref.ref(array) for array in own.matrices]
    moe = low_level_moe(engine, own, P)
    del own
    gc.collect()
    out = fresh_out()
    engine.run(moe.forward_task(*batch, out))
    assert_same_bits(out, expected)
    engine.submit(moe.forward_task(*batch, out))
    del moe  # the task holds the layer
    assert all(ref() is not None for ref in refs)
    engine.sync()
    gc.collect()
    assert all(ref() is None for ref in refs)


def test_replaced_weights_are_let_go(engine: Any, moe: Any, layer: Layer) -> None:
    own = layer.with_matrices(np.copy)
    refs = [weakref.ref(array) for array in own.matrices]
    engine.run(moe.load_weights_task(*own.matrices))
    del own
    assert all(ref() is not None for ref in refs)
    engine.run(moe.load_weights_task(*layer.matrices))
    gc.collect()
    assert all(ref() is None for ref in refs)


def test_an_engine_that_is_dropped_finishes_first(layer: Layer, batch: Batch, expected: AnyArray) -> None:
    engine = engine_of(2)
    moe, outs = low_level_moe(engine, layer, P), [fresh_out() for _ in range(50)]
    for out in outs:
        engine.submit(moe.forward_task(*batch, out))
    del engine
    gc.collect()
    for out in outs:
        assert_same_bits(out, expected)


def num_os_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_threads_end_with_the_engine() -> None:
    before = num_os_threads()
    for threads in ((1,), (4,), (2, 3)):
        engine = engine_of(*threads)
        assert num_os_threads() == before + sum(threads)  # one less works, one runs the queue
        engine.shutdown()
        assert num_os_threads() == before
        engine = engine_of(*threads)
        del engine
        assert num_os_threads() == before


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.memory
def test_thousands_of_calls_leave_nothing(layer: Layer, batch: Batch) -> None:
    moe = layer.wrapper(P)
    small, wrong = batch.rows(slice(2)), bad(batch)
    kept = (*small, *wrong, *layer.matrices, moe)

    def calls(num: int) -> None:
        for _ in range(num):
            moe.forward(*small)
            moe.submit_forward(*small)
            moe.sync_forward()
            with pytest.raises(IndexError):
                moe.forward(*wrong)
            moe.submit_forward(*wrong)
            with pytest.raises(IndexError):
                moe.sync_forward()
            with pytest.raises(ValueError, match="topk_weights"):
                moe.forward(small.x, small.ids, small.weights[:1])

    calls(300)
    gc.collect()
    counts, resident = [sys.getrefcount(thing) for thing in kept], resident_bytes()
    calls(200 if IS_SLOW else 1000)
    gc.collect()
    assert [sys.getrefcount(thing) for thing in kept] == counts
    assert resident_bytes() - resident < 2 << 20

    tracemalloc.start()
    try:
        calls(10)
        before = tracemalloc.get_traced_memory()[0]
        calls(100)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()


@pytest.mark.memory
def test_loading_again_and_again_leaves_nothing() -> None:
    rng = np.random.default_rng(3)
    layer = draw_layer(rng, E, 64, 128, with_biases=True)  # 200 kB
    moe = layer.wrapper(P)
    for num in (20, 200):
        resident = resident_bytes()
        for _ in range(num):
            layer.with_matrices(np.copy).load_into(moe)
    assert resident_bytes() - resident < 4 << 20


@pytest.mark.memory
def test_engines_leave_nothing() -> None:
    for num in (5, 50):
        resident = resident_bytes()
        for _ in range(num):
            engine_of(2, 1).shutdown()
    assert resident_bytes() - resident < 2 << 20


@pytest.mark.serial
def test_an_idle_engine_takes_no_cpu(layer: Layer, batch: Batch) -> None:
    moe = layer.wrapper(P)
    moe.forward(*batch)
    moe.submit_forward(*batch)
    moe.sync_forward()
    for _ in range(5):  # other threads of this process may still be busy with what came before
        begin, used = time.perf_counter(), time.process_time()
        time.sleep(0.2)
        if time.process_time() - used < 0.02 * (time.perf_counter() - begin):
            return
    pytest.fail("the engine keeps a CPU busy with nothing to do")
