"""Do layers count what they computed, whichever way a pass came, and change no bit by it?"""

from __future__ import annotations

import doctest
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import AnyArray, Batch, assert_same_bits, draw_batch, draw_layer, num_examples
from sft_layers import draw_student, draw_training

import ktmoe_np.layers.base
from ktmoe_np import KTMoEWrapper, generate_gpu_experts_masks

E, I, H, P = 6, 16, 24, 2  # noqa: E741

INFERENCE_PHASES = {"route", "gate_up", "down", "combine"}


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.layers.base).failed == 0


def counts(stats: Any) -> tuple[Any, ...]:
    return (
        stats.forward_calls,
        stats.backward_calls,
        stats.tokens,
        stats.rows,
        stats.expert_readings,
        stats.expert_tokens.tolist(),
    )


def expected_counts(batches: list[AnyArray], mask: AnyArray, chunk: int) -> tuple[Any, ...]:
    """What passes over batches with these ids count."""
    num_tokens, num_rows, num_readings = 0, 0, 0
    histogram = np.zeros(E, np.int64)
    for ids in batches:
        num_tokens += len(ids)
        for i in range(0, len(ids), chunk):
            routed = ids[i : i + chunk].ravel()
            routed = routed[routed >= 0]
            histogram += np.bincount(routed, minlength=E)
            here = routed[~mask[routed]]
            num_rows += len(here)
            num_readings += len(set(here.tolist()))
    return len(batches), 0, num_tokens, num_rows, num_readings, histogram.tolist()


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.integers(1, 12),
    st.lists(st.booleans(), min_size=E, max_size=E),
    st.integers(0, 2**32 - 1),
)
def test_counts_are_those_of_the_ids(sizes: list[int], chunk: int, masked: list[bool], seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer = draw_layer(rng, E, I, H)
    moe = layer.wrapper(P, chunked_prefill_size=chunk, gpu_experts_mask=np.array(masked))
    plain = layer.wrapper(P, chunked_prefill_size=chunk, gpu_experts_mask=np.array(masked))
    moe.collect_stats()
    batches = []
    for size in sizes:
        batch = draw_batch(rng, layer, size, P)
        batch.ids[rng.random(batch.ids.shape) < 0.2] = -1
        batches.append(batch.ids)
        assert_same_bits(moe.forward(*batch), plain.forward(*batch))
    stats = moe.stats()
    assert counts(stats) == expected_counts(batches, np.array(masked), chunk)
    assert stats.weight_bytes == stats.expert_readings * moe.expert_bytes
    assert set(stats.phase_seconds) <= INFERENCE_PHASES
    assert 0 < sum(stats.phase_seconds.values()) <= stats.seconds


@pytest.mark.parametrize("num_deferred", [0, 1, 2])
@pytest.mark.parametrize("how", ["forward", "submit_forward"])
def test_a_pass_counts_once_whatever_its_parts(how: str, num_deferred: int) -> None:
    rng = np.random.default_rng(0)
    layer = draw_layer(rng, E, I, H)
    batch = draw_batch(rng, layer, 7, P)
    moe = layer.wrapper(P, max_deferred_experts_per_token=num_deferred, chunked_prefill_size=3)
    moe.collect_stats()
    if how == "forward":
        moe.forward(*batch)
    else:
        moe.submit_forward(*batch)
        moe.sync_forward()
    KTMoEWrapper.drain_deferred()
    stats = moe.stats()
    assert (stats.forward_calls, stats.tokens, stats.rows) == (1, 7, 14)
    assert stats.expert_tokens.tolist() == np.bincount(batch.ids.ravel(), minlength=E).tolist()


@pytest.mark.parametrize("recompute", [False, True])
def test_training(recompute: bool) -> None:
    rng = np.random.default_rng(1)
    student = draw_student(rng, (E, I, H), rank=2)
    batch, grad_output = draw_training(rng, student, 5, P)
    sft = student.wrapper(P, recompute=recompute)
    sft.collect_stats()
    sft.forward_sft(*batch)
    sft.backward(grad_output)
    stats = sft.stats()
    active = len(np.unique(batch.ids))
    assert (stats.forward_calls, stats.backward_calls, stats.tokens) == (1, 1, 5)
    assert stats.expert_readings == 2 * active
    assert {"save_inputs", "adapters", "backward_input", "weight_gradients"} <= set(stats.phase_seconds)
    assert sum(stats.phase_seconds.values()) <= stats.seconds


def test_reset_and_off() -> None:
    rng = np.random.default_rng(2)
    layer = draw_layer(rng, E, I, H)
    batch = draw_batch(rng, layer, 3, P)
    moe = layer.wrapper(P)
    with pytest.raises(RuntimeError, match="stats: layer 0 does not collect any, call collect_stats"):
        moe.stats()
    moe.forward(*batch)
    moe.collect_stats()
    moe.forward(*batch)
    assert moe.stats(reset=True).forward_calls == 1
    assert moe.stats().forward_calls == 0
    assert moe.stats().seconds == 0
    assert "0 forward and 0 backward calls, 0 tokens" in repr(moe.stats())
    moe.forward(*batch)
    moe.collect_stats()
    assert moe.stats().tokens == 0
    moe.collect_stats(False)
    with pytest.raises(RuntimeError, match="stats: layer 0"):
        moe.stats()


def test_a_refused_batch_counts_nothing() -> None:
    rng = np.random.default_rng(3)
    layer = draw_layer(rng, E, I, H)
    x, ids, weights = draw_batch(rng, layer, 3, P)
    moe = layer.wrapper(P)
    moe.collect_stats()
    ids[2, 1] = E
    with pytest.raises(IndexError):
        moe.forward(x, ids, weights)
    assert counts(moe.stats()) == (0, 0, 0, 0, 0, [0] * E)


def test_masks_from_what_was_counted() -> None:
    """What the mask took away is still counted, so that the next mask can differ."""
    rng = np.random.default_rng(4)
    layer = draw_layer(rng, E, I, H)
    moe = layer.wrapper(P, gpu_experts_mask=np.arange(E) == 0)
    moe.collect_stats()
    ids = np.array([[0, 1], [0, 2], [0, 2], [0, 2]])
    moe.forward(np.zeros((4, H), ml_dtypes.bfloat16), ids, np.ones((4, P), np.float32))
    stats = moe.stats()
    assert stats.rows == 4
    masks = generate_gpu_experts_masks(stats.expert_tokens[None], 2)
    assert np.flatnonzero(masks[0]).tolist() == [0, 2]


@pytest.mark.engine
def test_reading_while_passes_run() -> None:
    rng = np.random.default_rng(5)
    layer = draw_layer(rng, E, I, H)
    batch = draw_batch(rng, layer, 40, P)
    moe = layer.wrapper(P)
    moe.collect_stats()
    num_calls = num_examples(200)

    def run() -> None:
        for _ in range(num_calls):
            moe.forward(*batch)

    thread = threading.Thread(target=run)
    thread.start()
    total = 0
    while thread.is_alive():
        total += moe.stats(reset=True).forward_calls
    thread.join()
    assert total + moe.stats().forward_calls == num_calls


@pytest.mark.crosscheck
def test_passes_of_jax_programs() -> None:
    jax = pytest.importorskip("jax")
    from ktmoe_np.jax import moe_forward

    rng = np.random.default_rng(6)
    layer = draw_layer(rng, E, I, H)
    batch = Batch(*draw_batch(rng, layer, 5, P))
    moe = layer.wrapper(P, chunked_prefill_size=2)
    moe.collect_stats()
    jax.block_until_ready(jax.jit(lambda *arrays: moe_forward(moe, *arrays))(*batch))
    stats = moe.stats()
    assert (stats.forward_calls, stats.tokens, stats.rows) == (1, 5, 10)
