"""What must hold to the last bit, whatever the numbers are. No reference is needed for any of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    ACTIVATIONS,
    IS_SLOW,
    POOLS,
    STORAGES,
    Batch,
    Layer,
    assert_same_bits,
    bf16,
    draw_batch,
    draw_layer,
    low_level_moe,
    num_examples,
    stored,
)

pytestmark = pytest.mark.kernels

AnyArray = Any
float32 = np.dtype(np.float32)

law = settings(deadline=None, max_examples=num_examples(40))
seeds = st.integers(0, 2**32 - 1)
#: E, I, H; the second is large enough that more than one thread works on it, in the last rows are long.
sizes = st.sampled_from([(3, 45, 70), (6, 96, 160), (4, 33, 31), (2, 64, 64), (2, 17, 2100)])
slots = st.integers(1, 4)
activations = st.sampled_from(ACTIVATIONS)


def drawn(seed: int, size: tuple[int, int, int], num_slots: int, num_tokens: int, **options: Any) -> Any:
    rng = np.random.default_rng(seed)
    layer = draw_layer(rng, *size, with_biases=bool(rng.integers(2)), **options)
    return rng, layer, draw_batch(rng, layer, num_tokens, num_slots)


def exact(layer: Layer, batch: Batch, **options: Any) -> AnyArray:
    """The result before its last rounding, where a difference cannot hide."""
    return layer.forward(batch, out=np.empty(batch.x.shape, np.float32), **options)


# ---- who else is in the batch ----


@law
@given(seeds, sizes, slots, activations)
def test_permuted_tokens_give_permuted_rows(seed: int, size: Any, num_slots: int, activation: Any) -> None:
    rng, layer, batch = drawn(seed, size, num_slots, 40, activation=activation)
    order = rng.permutation(40)
    assert_same_bits(exact(layer, batch.rows(order)), exact(layer, batch)[order])


@law
@given(seeds, sizes, slots)
def test_a_token_alone_is_as_in_the_batch(seed: int, size: Any, num_slots: int) -> None:
    _, layer, batch = drawn(seed, size, num_slots, 35)
    alone = [exact(layer, batch.rows(slice(t, t + 1))) for t in range(35)]
    assert_same_bits(np.concatenate(alone), exact(layer, batch))


@pytest.mark.parametrize("routing", ["spread", "one expert"])
@pytest.mark.parametrize("size", [(3, 45, 70), (2, 64, 96), (1, 3, 2100)], ids=str)
def test_batches_of_all_sizes_agree(size: tuple[int, int, int], routing: str) -> None:
    _, layer, batch = drawn(0, size, 2, 300)
    if routing == "one expert":
        batch.ids[...] = 0
    whole = exact(layer, batch)
    for num in (
        1,
        2,
        3,
        5,
        8,
        12,
        13,
        14,
        15,
        16,
        17,
        18,
        31,
        32,
        33,
        63,
        64,
        65,
        127,
        128,
        129,
        200,
        257,
        299,
    ):
        assert_same_bits(exact(layer, batch.rows(slice(num))), whole[:num], f"{num} tokens")
        assert_same_bits(exact(layer, batch.rows(slice(300 - num, 300))), whole[300 - num :], f"last {num}")


@pytest.mark.parametrize("chunk", [1, 7, 64, 99, 100, 101, 2**40])
def test_chunks_do_not_show(chunk: int) -> None:
    _, layer, batch = drawn(1, (3, 45, 70), 2, 100)
    whole = exact(layer, batch)
    moe = layer.wrapper(2, chunked_prefill_size=chunk)
    assert_same_bits(moe.forward(*batch, out=np.empty(whole.shape, np.float32)), whole)
    out = np.ones(whole.shape, np.float32)
    moe.submit_forward(*batch, out=out, incremental=True)
    result = moe.sync_forward()
    assert result is out
    assert_same_bits(result, exact_added(layer, batch, np.ones(whole.shape, np.float32)))


def exact_added(layer: Layer, batch: Batch, out: AnyArray) -> AnyArray:
    return layer.forward(batch, out=out, incremental=True)


# ---- who computes ----


def low_level(engine: Any, layer: Layer, batch: Batch) -> AnyArray:
    """The result on an engine of one's own choice."""
    out = np.full(batch.x.shape, np.nan, np.float32)
    engine.run(low_level_moe(engine, layer, batch.ids.shape[1]).forward_task(*batch, out))
    return out


@law
@given(
    seeds,
    st.sampled_from([(3, 45, 70), (8, 96, 160), (5, 192, 130), (3, 7, 9), (2, 33, 2081), (2, 2081, 33)]),
    slots,
    st.sampled_from([1, 2, 16, 45, 90]),
    activations,
)
def test_any_threads_give_the_same_bits(
    engines: list[Any], seed: int, size: Any, num_slots: int, num_tokens: int, activation: Any
) -> None:
    _, layer, batch = drawn(seed, size, num_slots, num_tokens, activation=activation)
    expected = low_level(engines[0], layer, batch)
    for pool, engine in zip(POOLS[1:], engines[1:], strict=True):
        assert_same_bits(low_level(engine, layer, batch), expected, f"threads {pool}")
    assert_same_bits(exact(layer, batch), expected, "the engine of the wrappers")


def test_many_rows_on_any_threads(engines: list[Any]) -> None:
    _, layer, batch = drawn(2, (2, 70, 100), 2, 700)
    expected = low_level(engines[0], layer, batch)
    for pool, engine in zip(POOLS[1:], engines[1:], strict=True):
        assert_same_bits(low_level(engine, layer, batch), expected, f"threads {pool}")


def test_again_and_again() -> None:
    _, layer, batch = drawn(3, (6, 96, 160), 3, 50)
    moe = layer.wrapper(3)
    first = moe.forward(*batch)
    for _ in range(10 if IS_SLOW else 50):
        assert_same_bits(moe.forward(*batch), first)


def test_what_ran_before_does_not_matter() -> None:
    """Scratch is shared by layers and keeps what was in it; none of it may come back."""
    _, layer, batch = drawn(4, (3, 45, 70), 2, 40)
    expected = exact(layer, batch)
    _, poison, poisoned_batch = drawn(5, (2, 100, 130), 2, 300)
    poison = poison.with_matrices(lambda array: np.full_like(array, np.nan))
    for num in (300, 1, 17):
        poison.forward(poisoned_batch.rows(slice(num)))
        assert_same_bits(exact(layer, batch), expected)


# ---- routing ----


@law
@given(seeds, sizes, slots, activations)
def test_a_masked_expert_is_one_with_id_minus_1(
    seed: int, size: Any, num_slots: int, activation: Any
) -> None:
    rng, layer, batch = drawn(seed, size, num_slots, 30, activation=activation)
    mask = rng.random(layer.num_experts) < 0.5
    skipped = batch._replace(ids=np.where(mask[batch.ids], -1, batch.ids))
    masked = exact(layer, batch, gpu_experts_mask=mask)
    assert_same_bits(masked, exact(layer, skipped))
    # With the weight zeroed instead, its terms are zeros, of either sign.
    zeroed = batch._replace(weights=np.where(mask[batch.ids], float32.type(0), batch.weights))
    np.testing.assert_array_equal(masked, exact(layer, zeroed))


@law
@given(seeds, sizes, slots)
def test_a_mask_can_be_exchanged(seed: int, size: Any, num_slots: int) -> None:
    rng, layer, batch = drawn(seed, size, num_slots, 10)
    moe = layer.wrapper(num_slots)
    unmasked = moe.forward(*batch)
    mask = rng.random(layer.num_experts) < 0.5
    moe.set_gpu_experts_mask(mask)
    masked = moe.forward(*batch)
    assert_same_bits(masked, layer.forward(batch, gpu_experts_mask=mask))
    mask[...] = ~mask  # the layer has its own copy
    assert_same_bits(moe.forward(*batch), masked)
    moe.set_gpu_experts_mask(None)
    assert_same_bits(moe.forward(*batch), unmasked)


@law
@given(seeds, sizes, slots)
def test_skipped_slots_can_be_left_out(seed: int, size: Any, num_slots: int) -> None:
    rng, layer, batch = drawn(seed, size, num_slots + 1, 20)
    which = int(rng.integers(num_slots + 1))
    batch.ids[:, which] = -1
    batch.weights[:, which] = np.nan
    rest = batch._replace(ids=np.delete(batch.ids, which, 1), weights=np.delete(batch.weights, which, 1))
    assert_same_bits(exact(layer, batch), exact(layer, rest))


@law
@given(seeds, sizes, slots)
def test_tokens_without_an_expert_give_zeros(seed: int, size: Any, num_slots: int) -> None:
    rng, layer, batch = drawn(seed, size, num_slots, 20)
    without = rng.random(20) < 0.5
    batch.ids[without] = -1
    batch.x[without] = np.nan  # of no consequence when nothing is computed
    result = exact(layer, batch)
    assert not result[without].any()
    assert np.isfinite(result).all()
    kept = batch.rows(~without)
    assert_same_bits(result[~without], exact(layer, kept))


@law
@given(seeds, sizes, slots)
def test_duplicate_ids_count_like_two_experts_with_the_same_weights(
    seed: int, size: Any, num_slots: int
) -> None:
    rng, layer, batch = drawn(seed, size, num_slots, 20)
    twice = layer.picked(np.tile(np.arange(layer.num_experts), 2))
    one = batch._replace(ids=np.zeros_like(batch.ids) + rng.integers(0, layer.num_experts, (20, 1)))
    other = one._replace(ids=one.ids + layer.num_experts * rng.integers(0, 2, one.ids.shape))
    assert_same_bits(exact(layer, one), exact(twice, other))


@law
@given(seeds, sizes, slots, st.booleans())
def test_a_map_picks_weights_and_biases(seed: int, size: Any, num_slots: int, is_permutation: bool) -> None:
    rng, layer, batch = drawn(seed, size, num_slots, 20)
    num = layer.num_experts
    order = rng.permutation(num) if is_permutation else rng.integers(0, num, num)
    out = np.empty(batch.x.shape, np.float32)
    mapped = layer.wrapper(num_slots, order).forward(*batch, out=out)
    assert_same_bits(mapped, exact(layer.picked(order), batch))
    named = batch._replace(ids=order[batch.ids])
    assert_same_bits(mapped, exact(layer, named))


@law
@given(seeds, sizes, slots, st.integers(-20, 20), st.sampled_from([bf16, float32]))
def test_linear_in_routing_weights_that_are_powers_of_two(
    seed: int, size: Any, num_slots: int, exponent: int, dtype: Any
) -> None:
    _, layer, batch = drawn(seed, size, num_slots, 20)
    factor = float32.type(2.0**exponent)
    scaled = batch._replace(weights=batch.weights * factor)
    once = layer.forward(batch, out=np.empty(batch.x.shape, dtype))
    assert_same_bits(
        layer.forward(scaled, out=np.empty(batch.x.shape, dtype)),
        (once.astype(np.float32) * factor).astype(dtype),
    )


# ---- where the result goes ----


@law
@given(seeds, sizes, slots)
def test_bfloat16_is_the_float32_result_rounded(seed: int, size: Any, num_slots: int) -> None:
    _, layer, batch = drawn(seed, size, num_slots, 20)
    assert_same_bits(layer.forward(batch), exact(layer, batch).astype(bf16))


@law
@given(seeds, sizes, slots, st.sampled_from([bf16, float32]))
def test_incremental_adds_to_what_is_there(seed: int, size: Any, num_slots: int, dtype: Any) -> None:
    rng, layer, batch = drawn(seed, size, num_slots, 20)
    fresh = layer.forward(batch, out=np.empty(batch.x.shape, dtype))
    onto_zeros = layer.forward(batch, out=np.zeros(batch.x.shape, dtype), incremental=True)
    np.testing.assert_array_equal(onto_zeros, fresh)

    base = rng.standard_normal(batch.x.shape, np.float32).astype(dtype)
    moe = layer.wrapper(num_slots)
    once, twice = base.copy(), base.copy()
    moe.forward(*batch, out=once, incremental=True)
    moe.forward(*batch, out=twice, incremental=True)
    moe.forward(*batch, out=twice, incremental=True)
    # The low-level `base` is the same sum, with the result elsewhere.
    engine, beside = moe.cpu_infer, np.empty_like(base)
    engine.run(moe._layer.forward_task(*batch, beside, base=base))
    assert_same_bits(beside, once)
    engine.run(moe._layer.forward_task(*batch, beside, base=once))
    assert_same_bits(beside, twice)


@law
@given(seeds, sizes, st.integers(2, 4))
def test_slots_in_order_are_passes_in_order(seed: int, size: Any, num_slots: int) -> None:
    """A slot at a time into the same float32 output is the sum that one pass makes."""
    _, layer, batch = drawn(seed, size, num_slots, 20)
    one_slot, out = layer.wrapper(1), np.zeros(batch.x.shape, np.float32)
    for p in range(num_slots):
        ids, weights = (np.ascontiguousarray(array[:, p : p + 1]) for array in (batch.ids, batch.weights))
        one_slot.forward(batch.x, ids, weights, out=out, incremental=True)
    np.testing.assert_array_equal(out, exact(layer, batch))


# ---- where the arrays lie ----


@law
@given(seeds, sizes, st.sampled_from(list(STORAGES)), st.sampled_from([1, 5, 40]))
def test_weights_in_any_memory_give_the_same_bits(
    seed: int, size: Any, storage: str, num_tokens: int
) -> None:
    _, layer, batch = drawn(seed, size, 2, num_tokens)
    moved = layer.with_matrices(lambda array: stored(array, storage))
    assert_same_bits(exact(moved, batch), exact(layer, batch))


@pytest.mark.parametrize("offset", [2, 4, 30, 62])
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_inputs_at_any_address_give_the_same_bits(offset: int, num_tokens: int) -> None:
    _, layer, batch = drawn(6, (3, 45, 70), 2, num_tokens)
    moved = Batch(*(stored(array, "2 bytes off") for array in batch))
    memory = np.empty(batch.x.size * 4 + offset, np.uint8)
    out = memory[offset : offset + batch.x.size * 2].view(bf16).reshape(batch.x.shape)
    assert_same_bits(layer.forward(moved, out=out), layer.forward(batch))


def test_submitted_is_as_called() -> None:
    _, layer, batch = drawn(7, (6, 96, 160), 3, 50)
    moe = layer.wrapper(3)
    moe.submit_forward(*batch)
    assert_same_bits(moe.sync_forward(), moe.forward(*batch))


def test_loaded_again_is_as_loaded() -> None:
    _, layer, batch = drawn(8, (3, 45, 70), 2, 30)
    _, other, _ = drawn(9, (3, 45, 70), 2, 30)
    moe = layer.wrapper(2)
    expected = moe.forward(*batch)
    other.load_into(moe)
    assert_same_bits(moe.forward(*batch), other.forward(batch))
    layer.load_into(moe)
    assert_same_bits(moe.forward(*batch), expected)
