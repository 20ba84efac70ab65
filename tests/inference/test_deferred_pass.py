"""Passes that defer experts, step by step: how routing is split, and what each part computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import assert_same_bits, bf16, draw, draw_batch, draw_layer, engine_of, low_level_moe

from ktmoe_np import kt_kernel_ext as ext

pytestmark = pytest.mark.kernels

H = 24


@pytest.fixture(scope="module")
def engine() -> Any:
    made = engine_of(1, 1)
    yield made
    made.shutdown()


class Arrays:
    """The arrays of a pass, and the pass."""

    def __init__(
        self, moe: Any, batch: Any, num_deferred: int, num_tokens: Any = None, **options: Any
    ) -> None:
        x, ids, weights = batch
        self.immediate, self.deferred = np.full((2, *ids.shape), 7)
        self.out, self.deferred_output = np.full(x.shape, 7, bf16), np.full(x.shape, 7, np.float32)
        deferring = (
            {"deferred_ids": self.deferred, "deferred_output": self.deferred_output} if num_deferred else {}
        )
        arguments = {"chunk_size": len(x) + 1, "num_deferred": num_deferred, "num_tokens": num_tokens}
        arguments |= deferring | options
        self.step = ext.moe.DeferredPass(moe, x, ids, weights, self.out, self.immediate, **arguments)

    def run(self, engine: Any) -> None:
        engine.run(self.step.immediate_tasks())
        engine.run(self.step.deferred_tasks())


def expected(ids: Any, weights: Any, num_deferred: int, used: int) -> tuple[Any, Any]:
    """Of each token those of the largest weights, the first of equal ones; NaN is the smallest."""
    order = np.argsort(-weights, axis=1, kind="stable")
    immediate = np.zeros(ids.shape, bool)
    np.put_along_axis(immediate, order[:, : ids.shape[1] - num_deferred], True, axis=1)
    is_used = np.arange(len(ids))[:, None] < used
    return np.where(immediate & is_used, ids, -1), np.where(~immediate & is_used, ids, -1)


@given(st.data())
def test_the_split_against_numpy(engine: Any, data: st.DataObject) -> None:
    tokens, slots = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 9))
    num_deferred, used = data.draw(st.integers(0, slots)), data.draw(st.integers(0, tokens))
    dtype = data.draw(st.sampled_from([np.int64, np.int32]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    moe = low_level_moe(engine, draw_layer(rng, 9, 8, H), slots)
    ids = rng.integers(-1, 9, (tokens, slots)).astype(dtype)
    weights = rng.choice([0.0, -0.0, 0.5, 1.0, -1.0, np.nan, np.inf], (tokens, slots)).astype(np.float32)
    number = np.array([used], data.draw(st.sampled_from([np.int64, np.int32])))
    made = Arrays(moe, (draw(rng, tokens, H), ids, weights), num_deferred, number)
    engine.run(made.step.immediate_tasks()[0])
    want_immediate, want_deferred = expected(ids, weights, num_deferred, used)
    np.testing.assert_array_equal(made.immediate, want_immediate)
    untouched = np.full_like(want_deferred, 7)
    np.testing.assert_array_equal(made.deferred, want_deferred if num_deferred else untouched)
    both = set(want_immediate[want_immediate >= 0]) & set(want_deferred[want_deferred >= 0])
    used_at_all = {int(id) for id in ids[:used].ravel() if id >= 0}
    assert made.step.is_joint == (num_deferred > 0 and 16 * len(both) > len(used_at_all))


@given(st.data())
def test_the_bits_are_those_of_two_passes(engine: Any, data: st.DataObject) -> None:
    """Of few experts the parts are joint, of many they are not, and chunks are cut: bits do not show it."""
    num_experts = data.draw(st.sampled_from([3, 300]))
    tokens, num_deferred = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    layer = draw_layer(rng, num_experts, 16, H)
    batch = draw_batch(rng, layer, tokens, 3)
    skip = rng.random(num_experts) < 0.2
    moe = low_level_moe(engine, layer, 3)
    first = Arrays(moe, batch, 3)
    made = Arrays(
        moe,
        batch,
        num_deferred,
        received=first.step.output,
        skip_experts=skip,
        chunk_size=data.draw(st.integers(1, 7)),
    )
    first.run(engine)
    made.run(engine)
    want, want_deferred = np.empty_like(made.out), np.empty_like(made.deferred_output)
    engine.run(
        moe.forward_task(
            batch.x, made.immediate, batch.weights, want, base=first.deferred_output, skip_experts=skip
        )
    )
    engine.run(moe.forward_task(batch.x, made.deferred, batch.weights, want_deferred, skip_experts=skip))
    assert_same_bits(made.out, want)
    assert_same_bits(made.deferred_output, want_deferred)
    rounded = np.empty_like(made.out)
    engine.run(made.step.output.rounding_task(rounded))
    assert_same_bits(rounded, want_deferred.astype(bf16))


@pytest.fixture(params=[3, 300], ids=["joint", "separate"])
def case(engine: Any, request: Any) -> Any:
    """A layer of few or of many experts, and a batch."""
    rng = np.random.default_rng(0)
    layer = draw_layer(rng, request.param, 16, H)
    x, _, weights = draw_batch(rng, layer, 4, 2)
    ids = np.arange(8).reshape(4, 2) % request.param
    return low_level_moe(engine, layer, 2), (x, ids, weights), request.param


def test_the_deferred_tasks_do_nothing_of_a_joint_pass(engine: Any, case: Any) -> None:
    moe, batch, num_experts = case
    made = Arrays(moe, batch, 1)
    engine.run(made.step.immediate_tasks())
    assert made.step.is_joint == (num_experts == 3)
    computed = made.deferred_output.copy()
    made.deferred_output[...] = 7
    engine.run(made.step.deferred_tasks())
    assert (computed != 7).any() == made.step.is_joint
    assert (made.deferred_output == 7).all() == made.step.is_joint


def test_copies_are_what_the_deferred_part_reads(engine: Any, case: Any) -> None:
    moe, batch, _ = case
    want = Arrays(moe, batch, 1)
    want.run(engine)
    x, ids, weights = (array.copy() for array in batch)
    copies = {"copied_hidden_states": np.empty_like(x), "copied_weights": np.empty_like(weights)}
    made = Arrays(moe, (x, ids, weights), 1, **copies)
    engine.run(made.step.immediate_tasks())
    x[...], ids[...], weights[...] = 1, 0, 1
    engine.run(made.step.deferred_tasks())
    assert_same_bits(made.deferred_output, want.deferred_output)
    # An array that is its own copy is read in place.
    x, ids, weights = batch
    made = Arrays(moe, batch, 1, copied_hidden_states=x, copied_weights=weights)
    made.run(engine)
    assert_same_bits(made.deferred_output, want.deferred_output)


# ---- passes that fail ----


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_a_wrong_id_in_either_part(engine: Any, case: Any, slot: int, dtype: Any) -> None:
    """The first task raises; nothing else is computed, and what is left is NaN."""
    moe, (x, ids, weights), num_experts = case
    ids = ids.astype(dtype)
    kept, ids[2, slot] = ids[2, slot], num_experts
    weights = np.array([[0.75, 0.25]] * 4, np.float32)
    made = Arrays(moe, (x, ids, weights), 1, chunk_size=3)
    following = Arrays(moe, (x, np.zeros_like(ids), weights), 0, received=made.step.output)
    message = rf"topk_ids: got expert {num_experts} at \[2, {slot}\], expected ids below {num_experts}"
    with pytest.raises(IndexError, match=message):
        made.step.check_ids()
    split, *chunks = made.step.immediate_tasks()
    with pytest.raises(IndexError, match=message):
        engine.run(split)
    engine.run(chunks + made.step.deferred_tasks())
    assert (made.out == 7).all()
    assert np.isnan(made.deferred_output).all()
    with pytest.raises(IndexError, match=message):
        made.step.output.raise_error()
    split, chunk = following.step.immediate_tasks()
    engine.run(split)
    with pytest.raises(IndexError, match=message):
        engine.run(chunk)
    ids[2, slot] = kept  # a new round
    made.run(engine)
    following.run(engine)
    made.step.output.raise_error()
    assert np.isfinite(made.deferred_output).all()
    assert np.isfinite(following.out.astype(np.float32)).all()


@pytest.mark.parametrize("number", [-1, 5])
def test_a_number_of_tokens_outside_the_batch(engine: Any, case: Any, number: int) -> None:
    moe, batch, _ = case
    made = Arrays(moe, batch, 1, np.array([number]))
    with pytest.raises(IndexError, match=f"num_tokens: got {number}, expected 0 to 4"):
        engine.run(made.step.immediate_tasks())
    assert np.isnan(made.deferred_output).all()


def test_parts_before_the_split(engine: Any, case: Any) -> None:
    moe, batch, _ = case
    made = Arrays(moe, batch, 1)
    for task in (made.step.immediate_tasks()[1], *made.step.deferred_tasks()):
        with pytest.raises(RuntimeError, match="deferred pass: got a part of it that was not split"):
            engine.run(task)


def test_nothing_is_left_when_nothing_is_deferred(engine: Any, case: Any) -> None:
    moe, batch, _ = case
    made = Arrays(moe, batch, 0)
    assert made.step.output is None
    assert made.step.deferred_tasks() == []
    made.run(engine)
    want = np.empty_like(made.out)
    engine.run(moe.forward_task(*batch, want))
    assert_same_bits(made.out, want)


# ---- what is wrong ----


def test_what_is_wrong(engine: Any, case: Any) -> None:
    moe, batch, _ = case
    x, ids, weights = batch
    made = Arrays(moe, batch, 1)
    few = Arrays(moe, (x[:3], ids[:3], weights[:3]), 1)
    out, to = np.empty_like(x), np.empty_like(ids)
    sums = np.empty(x.shape, np.float32)
    good = {"num_deferred": 1, "deferred_ids": np.empty_like(ids), "deferred_output": sums, "chunk_size": 4}
    for arguments, options, error, message in (
        ((x, ids.astype(np.int16), weights, out, to), {}, TypeError, "topk_ids: got int16"),
        ((x, ids[0], weights, out, to), {}, ValueError, r"topk_ids: got int64 \[2\]"),
        ((x, ids, weights[:2], out, to), {}, ValueError, "topk_weights: got float32"),
        ((x, ids, weights.astype(float), out, to), {}, TypeError, "topk_weights: got float64"),
        ((x[:3], ids, weights, out, to), {}, ValueError, r"topk_ids: got int64 \[4, 2\]"),
        ((x, ids, weights, out[:3], to), {}, ValueError, "out: got bfloat16"),
        ((x, ids, weights, out, to[:, :1]), {}, ValueError, "immediate_ids: got int64"),
        ((x, ids, weights, out, to.astype(np.int32)), {}, TypeError, "immediate_ids: got int32"),
        ((x, ids, weights, out, ids), {}, ValueError, "immediate_ids: its memory overlaps that of topk_ids"),
        ((x, ids, weights, x, to), {}, ValueError, "out: its memory overlaps that of hidden_states"),
        ((x, ids, weights, out, to), {"deferred_ids": None}, TypeError, "deferred_ids: got None"),
        ((x, ids, weights, out, to), {"deferred_ids": to}, ValueError, "deferred_ids: its memory overlaps"),
        ((x, ids, weights, out, to), {"deferred_output": out}, TypeError, "deferred_output: got bfloat16"),
        (
            (x, ids, weights, out, to),
            {"copied_hidden_states": out},
            ValueError,
            "copied_hidden_states: its memory overlaps",
        ),
        ((x, ids, weights, out, to), {"copied_weights": sums}, ValueError, "copied_weights: got float32"),
        ((x, ids, weights, out, to), {"chunk_size": 0}, ValueError, "chunk_size: got 0, expected 1 to"),
        ((x, ids, weights, out, to), {"num_deferred": 3}, ValueError, "num_deferred: got 3, expected 0 to 2"),
        ((x, ids, weights, out, to), {"num_deferred": -1}, ValueError, "num_deferred: got -1, expected"),
        ((x, ids, weights, out, to), {"num_tokens": np.zeros(2, int)}, ValueError, "num_tokens: got int64"),
        ((x, ids, weights, out, to), {"num_tokens": np.zeros(1)}, TypeError, "num_tokens: got float64"),
        (
            (x, ids, weights, out, to),
            {"received": made.step.output, "incremental": True},
            ValueError,
            "incremental: got True, but the output begins with the deferred experts of layer 0",
        ),
        (
            (x, ids, weights, out, to),
            {"received": few.step.output},
            ValueError,
            rf"hidden_states: got \[4, {H}\], expected \[3, {H}\] like the deferred output",
        ),
    ):
        with pytest.raises(error, match=message):
            ext.moe.DeferredPass(moe, *arguments, **(good | options))
    assert made.step.output.layer_idx == 0
    assert made.step.output.num_tokens == 4
    assert made.step.output.sums is made.deferred_output
    with pytest.raises(ValueError, match=r"out: got bfloat16 \[3, 24\], expected bfloat16 \[4, 24\]"):
        made.step.output.rounding_task(out[:3])
