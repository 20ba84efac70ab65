"""The split of a batch's routing into immediate and deferred slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import assert_same_bits, bf16, draw_batch, draw_layer, engine_of, low_level_moe

from ktmoe_np import kt_kernel_ext as ext

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def engine() -> Any:
    made = engine_of(1, 1)
    yield made
    made.shutdown()


def expected(ids: Any, weights: Any, num_deferred: int, used: int) -> tuple[Any, Any]:
    """Of each token those of the largest weights, the first of equal ones; NaN is the smallest."""
    order = np.argsort(-weights, axis=1, kind="stable")
    immediate = np.zeros(ids.shape, bool)
    np.put_along_axis(immediate, order[:, : ids.shape[1] - num_deferred], True, axis=1)
    is_used = np.arange(len(ids))[:, None] < used
    return np.where(immediate & is_used, ids, -1), np.where(~immediate & is_used, ids, -1)


@given(st.data())
def test_against_numpy(engine: Any, data: st.DataObject) -> None:
    tokens, slots = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 9))
    num_deferred, used = data.draw(st.integers(0, slots)), data.draw(st.integers(0, tokens))
    dtype = data.draw(st.sampled_from([np.int64, np.int32]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ids = rng.integers(-1, 9, (tokens, slots)).astype(dtype)
    weights = rng.choice([0.0, -0.0, 0.5, 1.0, -1.0, np.nan, np.inf], (tokens, slots)).astype(np.float32)
    number = np.array([used], data.draw(st.sampled_from([np.int64, np.int32])))
    immediate, deferred = np.full((2, tokens, slots), 7)
    split = ext.moe.SlotSplit(ids, weights, immediate, deferred, 9, num_deferred, number)
    engine.run(split.task())
    want_immediate, want_deferred = expected(ids, weights, num_deferred, used)
    np.testing.assert_array_equal(immediate, want_immediate)
    np.testing.assert_array_equal(deferred, want_deferred if num_deferred else np.full_like(deferred, 7))
    both = set(want_immediate[want_immediate >= 0]) & set(want_deferred[want_deferred >= 0])
    used_at_all = {int(id) for id in ids[:used].ravel() if id >= 0}
    assert split.is_joint == (num_deferred > 0 and 16 * len(both) > len(used_at_all))


def test_what_is_wrong(engine: Any) -> None:
    ids, weights, to = np.zeros((3, 2), np.int64), np.zeros((3, 2), np.float32), np.zeros((3, 2), np.int64)
    split = ext.moe.SlotSplit
    for arguments, error, message in (
        ((ids.astype(np.int16), weights, to, None, 5), TypeError, "topk_ids: got int16"),
        ((ids[0], weights, to, None, 5), ValueError, r"topk_ids: got int64 \[2\]"),
        ((ids, weights[:2], to, None, 5), ValueError, "topk_weights: got float32"),
        ((ids, weights.astype(float), to, None, 5), TypeError, "topk_weights: got float64"),
        ((ids, weights, to[:, :1], None, 5), ValueError, "immediate_ids: got int64"),
        ((ids, weights, to.astype(np.int32), None, 5), TypeError, "immediate_ids: got int32"),
        ((ids, weights, ids, None, 5), ValueError, "immediate_ids"),
        ((ids, weights, to, None, 5, 1), TypeError, "deferred_ids: got None"),
        ((ids, weights, to, to, 5, 1), ValueError, "deferred_ids"),
        ((ids, weights, to, None, 0), ValueError, "num_experts: got 0, expected 1 to"),
        ((ids, weights, to, None, 5, 3), ValueError, "num_deferred: got 3, expected 0 to 2"),
        ((ids, weights, to, None, 5, -1), ValueError, "num_deferred: got -1, expected 0 to 2"),
        ((ids, weights, to, None, 5, 0, np.zeros(2, int)), ValueError, r"num_tokens: got int64 \[2\]"),
        ((ids, weights, to, None, 5, 0, np.zeros(1)), TypeError, "num_tokens: got float64"),
    ):
        with pytest.raises(error, match=message):
            split(*arguments)


@pytest.mark.parametrize("number", [-1, 4])
def test_a_number_of_tokens_outside_the_batch(engine: Any, number: int) -> None:
    ids, weights = np.zeros((3, 2), np.int64), np.zeros((3, 2), np.float32)
    immediate, deferred = np.zeros((2, 3, 2), np.int64)
    split = ext.moe.SlotSplit(ids, weights, immediate, deferred, 1, 1, np.array([number]))
    with pytest.raises(IndexError, match=f"num_tokens: got {number}, expected 0 to 3"):
        engine.run(split.task())
    for found in (immediate, deferred):
        assert (found == np.iinfo(np.int64).max).all()


@pytest.mark.parametrize("slot", [0, 1])
def test_a_wrong_id_in_either_part(engine: Any, slot: int) -> None:
    ids, weights = np.zeros((3, 2), np.int32), np.array([[0.75, 0.25]] * 3, np.float32)
    ids[2, slot] = 4
    immediate, deferred = np.zeros((2, 3, 2), np.int64)
    with pytest.raises(IndexError, match=rf"topk_ids: got expert 4 at \[2, {slot}\], expected ids below 4"):
        engine.run(ext.moe.SlotSplit(ids, weights, immediate, deferred, 4, 1).task())
    for found in (immediate, deferred):
        assert (found == np.iinfo(np.int64).max).all()


# ---- the passes of a split ----


@given(st.data())
def test_a_joint_pass_has_the_bits_of_two(engine: Any, data: st.DataObject) -> None:
    """Of few experts the parts are joint, of many they are not: bits tell nothing of it."""
    num_experts = data.draw(st.sampled_from([3, 300]))
    tokens, num_deferred = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    layer = draw_layer(rng, num_experts, 16, 24)
    x, ids, weights = draw_batch(rng, layer, tokens, 3)
    skip = rng.random(num_experts) < 0.2
    low = low_level_moe(engine, layer, 3)
    base = rng.standard_normal((tokens, 24)).astype(np.float32)
    immediate, deferred = np.empty((2, tokens, 3), np.int64)
    out, left = np.empty((tokens, 24), bf16), np.empty((tokens, 24), np.float32)
    split = ext.moe.SlotSplit(ids, weights, immediate, deferred, num_experts, num_deferred)
    engine.run(split.task())
    engine.run(
        low.forward_task(
            x, immediate, weights, out, base=base, skip_experts=skip, split=split, deferred_out=left
        )
    )
    engine.run(low.forward_task(x, deferred, weights, left, skip_experts=skip, split=split))
    want, want_left = np.empty_like(out), np.empty_like(left)
    engine.run(low.forward_task(x, immediate, weights, want, base=base, skip_experts=skip))
    engine.run(low.forward_task(x, deferred, weights, want_left, skip_experts=skip))
    assert_same_bits(out, want)
    assert_same_bits(left, want_left)


@pytest.fixture
def joint(engine: Any) -> Any:
    """A layer of three experts, a batch, and arrays for its parts and their sums."""
    rng = np.random.default_rng(0)
    layer = draw_layer(rng, 3, 16, 24)
    sums = np.empty((4, 24), bf16), np.empty((4, 24), np.float32)
    return low_level_moe(engine, layer, 2), draw_batch(rng, layer, 4, 2), np.empty((2, 4, 2), np.int64), sums


def test_the_other_part_does_nothing_when_they_are_joint(engine: Any, joint: Any) -> None:
    low, (x, ids, weights), (immediate, deferred), (out, left) = joint
    split = ext.moe.SlotSplit(ids, weights, immediate, deferred, 3, 1)
    engine.run(split.task())
    assert split.is_joint
    engine.run(low.forward_task(x, immediate, weights, out, split=split, deferred_out=left))
    computed = left.copy()
    left[...] = 7
    engine.run(low.forward_task(x, deferred, weights, left, split=split))
    assert (left == 7).all()
    assert computed.any()


def test_what_is_wrong_with_the_parts(joint: Any) -> None:
    low, (x, ids, weights), (immediate, deferred), (out, left) = joint
    split = ext.moe.SlotSplit(ids, weights, immediate, deferred, 3, 1)
    with pytest.raises(ValueError, match="deferred_out: got one without a split, expected None"):
        low.forward_task(x, immediate, weights, out, deferred_out=left)
    with pytest.raises(ValueError, match=r"deferred_out: got float32 \[3, 24\]"):
        low.forward_task(x, immediate, weights, out, split=split, deferred_out=left[:3])
    with pytest.raises(ValueError, match="split: got one of 4 tokens and 2 slots, expected 3 and 2"):
        low.forward_task(x[:3], immediate[:3], weights[:3], out[:3], split=split)
    whole = ext.moe.SlotSplit(ids, weights, immediate, None, 3)
    with pytest.raises(ValueError, match="deferred_out: got one, expected None: no slot is deferred"):
        low.forward_task(x, immediate, weights, out, split=whole, deferred_out=left)
