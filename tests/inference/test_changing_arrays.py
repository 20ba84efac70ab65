"""Arrays that their owner writes to while a pass reads them: the result is any, but memory stays intact."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from layers import AnyArray, Batch, draw_batch, draw_layer
from sft_layers import draw_student, draw_training

from ktmoe_np import KTMoEWrapper

pytestmark = [pytest.mark.engine, pytest.mark.asan]

E, I, H, P, T = 16, 8, 8, 8, 2000  # noqa: E741
TURNS = 100


@contextmanager
def changing(array: AnyArray, low: int, high: int) -> Iterator[None]:
    """Let another thread write numbers from `low` to below `high` anywhere in the array."""
    stop = threading.Event()
    # Indexing a vector stores elements whole; `array.flat` may copy bytes, and half an id is wrong.
    elements = array.reshape(-1)
    assert np.shares_memory(elements, array)
    drawn = np.random.default_rng(0)
    places, values = drawn.integers(0, array.size, 4096), drawn.integers(low, high, 4096)

    def write() -> None:
        while not stop.is_set():
            elements[places] = np.roll(values, int(places[0]))
            elements[places[::-1]] = values

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def drawn_layer(**options: Any) -> tuple[Any, Batch]:
    rng = np.random.default_rng(1)
    layer = draw_layer(rng, E, I, H)
    return layer.wrapper(P, **options), draw_batch(rng, layer, T, P)


def assert_finite(y: AnyArray) -> None:
    assert np.isfinite(y.astype(np.float32)).all()


@pytest.mark.parametrize("num_deferred", [0, 2])
@pytest.mark.parametrize("how", ["forward", "submit_forward"])
def test_ids_of_a_layer(how: str, num_deferred: int) -> None:
    moe, batch = drawn_layer(max_deferred_experts_per_token=num_deferred)
    ids = batch.ids.copy()
    with changing(ids, -1, E):
        for _ in range(TURNS):
            if how == "forward":
                assert_finite(moe.forward(batch.x, ids, batch.weights))
            else:
                moe.submit_forward(batch.x, ids, batch.weights)
                assert_finite(moe.sync_forward())
            KTMoEWrapper.drain_deferred()


def test_ids_that_may_be_wrong() -> None:
    moe, batch = drawn_layer()
    ids = batch.ids.copy()
    with changing(ids, -1, E + 1):
        for _ in range(TURNS):
            with contextlib.suppress(IndexError):
                assert_finite(moe.forward(batch.x, ids, batch.weights))


def test_a_mask_of_gpu_experts() -> None:
    moe, batch = drawn_layer()
    mask = np.zeros(E, np.uint8)
    moe.set_gpu_experts_mask(mask.view(bool))
    with changing(mask, 0, 2):
        for _ in range(TURNS):
            assert_finite(moe.forward(*batch))


def test_ids_of_a_training_step() -> None:
    rng = np.random.default_rng(2)
    student = draw_student(rng, (E, I, H), rank=2)
    batch, grad_output = draw_training(rng, student, T, P)
    sft = student.wrapper(P)
    ids = batch.ids.copy()
    with changing(ids, -1, E):
        for _ in range(TURNS // 2):
            assert_finite(sft.forward_sft(batch.x, ids, batch.weights))
            assert_finite(sft.backward(grad_output).grad_input)
