"""Forward passes in chunks: a task for each, run one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layers import Batch, Layer, assert_same_bits, draw_batch, draw_layer, engine_of, low_level_moe

pytestmark = pytest.mark.kernels

E, I, H, P, T = 5, 24, 40, 2, 7  # noqa: E741


@pytest.fixture(scope="module")
def engine() -> Any:
    made = engine_of(1, 2)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def layer() -> Layer:
    return draw_layer(np.random.default_rng(0), E, I, H)


@pytest.fixture(scope="module")
def batch(layer: Layer) -> Batch:
    return draw_batch(np.random.default_rng(1), layer, T, P)


@pytest.mark.parametrize(("chunk", "num"), [(1, T), (2, -(-T // 2)), (T, 1), (T + 1, 1)])
def test_a_task_for_each_chunk(engine: Any, layer: Layer, batch: Batch, chunk: int, num: int) -> None:
    moe, whole = low_level_moe(engine, layer, P), np.ones((T, H), np.float32)
    engine.run(moe.forward_task(*batch, whole, incremental=True))
    out = np.ones((T, H), np.float32)
    tasks = moe.forward_tasks(*batch, out, chunk, incremental=True)
    assert len(tasks) == num
    before = engine.num_completed
    engine.run(tasks)
    assert engine.num_completed - before == num
    assert_same_bits(out, whole)
    with pytest.raises(ValueError, match="task: was submitted before"):
        engine.run(tasks)


def test_an_error_ends_a_run_of_tasks(engine: Any, layer: Layer, batch: Batch) -> None:
    moe, out = low_level_moe(engine, layer, P), np.zeros((T, H), np.float32)
    wrong = batch.ids.copy()
    wrong[0, 0] = E
    bad = moe.forward_task(batch.x, wrong, batch.weights, np.empty_like(out))
    good = moe.forward_task(*batch, out)
    with pytest.raises(IndexError, match=f"topk_ids: got expert {E}"):
        engine.run([bad, good])
    engine.sync()
    assert (out == 0).all()
    engine.run(good)
    assert out.any()
    engine.run([])
    with pytest.raises(ValueError, match="chunk_size: got 0, expected 1 to"):
        moe.forward_tasks(*batch, out, 0)
    with pytest.raises(TypeError, match="tasks: got None, expected a Task"):
        engine.run([None])
