"""What must hold of training whatever the numbers are, most of it to the last bit."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import ACTIVATIONS, IS_SLOW, Batch, assert_same_bits, bf16, draw, draw_batch, num_examples
from sft_layers import (
    THREAD_CASES,
    Step,
    Student,
    assert_same_on_any_threads,
    assert_same_steps,
    assert_step_close,
    by_name,
    draw_student,
    draw_training,
    joined,
    per_matrix,
    train,
)

from ktmoe_np import SFTGradients
from ktmoe_np.reference import Dropout

pytestmark = pytest.mark.kernels

AnyArray = Any

law = settings(deadline=None, max_examples=num_examples(25))
seeds = st.integers(0, 2**32 - 1)
#: E, I, H; the last is large enough that more than one thread works on it.
sizes = st.sampled_from([(3, 45, 70), (4, 33, 31), (2, 64, 64), (6, 96, 160)])
ranks = st.sampled_from([1, 3, 16])
slots = st.integers(1, 3)
activations = st.sampled_from(ACTIVATIONS)


def drawn(
    seed: int, size: Any, num_tokens: int, num_slots: int, rank: int = 8, activation: Any = "silu"
) -> tuple[np.random.Generator, Student, Batch, AnyArray]:
    rng = np.random.default_rng(seed)
    student = draw_student(rng, size, rank, activation, with_biases=bool(rng.integers(2)))
    return rng, student, *draw_training(rng, student, num_tokens, num_slots)


# ---- inference ----


@law
@given(seeds, sizes, slots, activations, st.sampled_from(["rank 0", "B = 0", "first"]), st.booleans())
def test_without_adapters_it_is_inference(
    seed: int, size: Any, num_slots: int, activation: Any, kind: str, saved: bool
) -> None:
    rng, student, batch, _ = drawn(seed, size, 30, num_slots, activation=activation)
    lora = {}
    if kind == "B = 0":
        lora = {k: m if k.endswith("a") else np.zeros_like(m) for k, m in student.lora.items()}
    student = Student(student.layer, lora, 0 if kind == "rank 0" else student.rank)
    mask = rng.random(student.layer.num_experts) < 0.3
    mapped = rng.integers(0, student.layer.num_experts, student.layer.num_experts)
    inference = student.layer.wrapper(num_slots, mapped, gpu_experts_mask=mask)
    moe = student.wrapper(num_slots, mapped, gpu_experts_mask=mask, lora_dropout=0.5)
    for dtype in (np.float32, bf16):
        moe.clear_cache()
        out = np.empty(batch.x.shape, dtype)
        expected = inference.forward(*batch, out=out.copy())
        assert_same_bits(moe.forward_sft(*batch, saved, out=out), expected)
    assert_same_bits(moe.forward(*batch), inference.forward(*batch))


@law
@given(seeds, sizes, slots, ranks)
def test_saving_changes_nothing(seed: int, size: Any, num_slots: int, rank: int) -> None:
    _, student, batch, _ = drawn(seed, size, 30, num_slots, rank)
    for options in ({}, {"recompute": True}, {"cache_dtype": np.float32}):
        moe = student.wrapper(num_slots, **options)
        assert_same_bits(moe.forward_sft(*batch), moe.forward(*batch))


# ---- who else is in the batch ----


@law
@given(seeds, sizes, slots, ranks, activations)
def test_permuted_tokens_give_permuted_rows(
    seed: int, size: Any, num_slots: int, rank: int, activation: Any
) -> None:
    rng, student, batch, grad_output = drawn(seed, size, 40, num_slots, rank, activation)
    order = rng.permutation(40)
    moe = student.wrapper(num_slots)
    plain, permuted = train(moe, batch, grad_output), train(moe, batch.rows(order), grad_output[order])
    assert_same_bits(permuted.out, plain.out[order])
    for name in ("grad_input", "grad_weights"):
        assert_same_bits(permuted.gradients[name], plain.gradients[name][order], name)


@law
@given(seeds, sizes, slots, ranks)
def test_a_token_alone_is_as_in_the_batch(seed: int, size: Any, num_slots: int, rank: int) -> None:
    _, student, batch, grad_output = drawn(seed, size, 20, num_slots, rank)
    moe = student.wrapper(num_slots)
    whole = train(moe, batch, grad_output)
    for t in range(20):
        rows = slice(t, t + 1)
        alone = train(moe, batch.rows(rows), grad_output[rows].copy())
        assert_same_bits(alone.out, whole.out[rows])
        for name in ("grad_input", "grad_weights"):
            assert_same_bits(alone.gradients[name], whole.gradients[name][rows], name)


@law
@given(seeds, sizes, slots, ranks, st.integers(0, 30))
def test_gradients_add_over_micro_batches(
    seed: int, size: Any, num_slots: int, rank: int, first: int
) -> None:
    _, student, batch, grad_output = drawn(seed, size, 30, num_slots, rank)
    moe = student.wrapper(num_slots, full_weight_grad=True)
    parts = [train(moe, batch.rows(rows), grad_output[rows]) for rows in (slice(first), slice(first, None))]
    assert_step_close(joined(parts), student, batch, grad_output)


@law
@given(seeds, sizes, ranks, st.booleans(), st.booleans())
def test_accumulating_is_adding(seed: int, size: Any, rank: int, full: bool, recompute: bool) -> None:
    rng, student, batch, grad_output = drawn(seed, size, 30, 2, rank)
    moe = student.wrapper(2, full_weight_grad=full, recompute=recompute)
    fresh = train(moe, batch, grad_output)
    base = {name: rng.standard_normal(v.shape, np.float32) for name, v in per_matrix(fresh).items()}
    into = SFTGradients(np.empty(0), np.empty(0), **{name: value.copy() for name, value in base.items()})
    moe.forward_sft(*batch)
    added = moe.backward(grad_output, gradients=into, accumulate=True)
    for name, value in base.items():
        assert added.matrices[name] is into.matrices[name]
        assert_same_bits(into.matrices[name], value + fresh.gradients[name], name)
    assert_same_bits(added.grad_input, fresh.gradients["grad_input"])
    assert_same_bits(added.grad_weights, fresh.gradients["grad_weights"])


@law
@given(
    seeds, sizes, ranks, st.sets(st.sampled_from(["gate_lora_a", "up_lora_b", "down_lora_b", "gate_proj"]))
)
def test_gradients_that_are_not_requested(seed: int, size: Any, rank: int, names: set[str]) -> None:
    _, student, batch, grad_output = drawn(seed, size, 30, 2, rank)
    moe = student.wrapper(2, full_weight_grad=True)
    every = train(moe, batch, grad_output)
    arrays = {name: np.full_like(every.gradients[name], np.nan) for name in names}
    some = train(moe, batch, grad_output, gradients=SFTGradients(np.empty(0), np.empty(0), **arrays))
    kept = {name: value for name, value in every.gradients.items() if name in names or "_w" in name}
    kept["grad_input"] = every.gradients["grad_input"]
    assert_same_steps(Step(some.out, dict(sorted(some.gradients.items()))), Step(every.out, kept))


# ---- the gradient of the output ----


@law
@given(seeds, sizes, slots, ranks, st.integers(-20, 20))
def test_linear_in_powers_of_two(seed: int, size: Any, num_slots: int, rank: int, exponent: int) -> None:
    _, student, batch, grad_output = drawn(seed, size, 20, num_slots, rank)
    factor = np.float32(2.0**exponent)
    moe = student.wrapper(num_slots, full_weight_grad=True)
    once = train(moe, batch, grad_output)
    scaled = train(moe, batch, (grad_output.astype(np.float32) * factor).astype(bf16))
    for name, value in once.gradients.items():
        expected = (value.astype(np.float32) * factor).astype(value.dtype)
        assert_same_bits(scaled.gradients[name], expected, name)


def test_no_gradient_of_the_output_is_none_of_anything() -> None:
    _, student, batch, grad_output = drawn(0, (3, 45, 70), 20, 2)
    step = train(student.wrapper(2, full_weight_grad=True), batch, np.zeros_like(grad_output))
    assert not any(value.any() for value in step.gradients.values())


# ---- who computes ----


@law
@given(*THREAD_CASES)
def test_any_threads_give_the_same_bits(engines: list[Any], case: Any, options: dict[str, Any]) -> None:
    _, student, batch, grad_output = drawn(*case)
    assert_same_on_any_threads(engines, student, batch, grad_output, **options)


def test_many_rows_on_any_threads(engines: list[Any]) -> None:
    _, student, batch, grad_output = drawn(1, (2, 70, 100), 300 if IS_SLOW else 700, 2, 16)
    assert_same_on_any_threads(engines, student, batch, grad_output)


def test_again_and_again_and_after_others() -> None:
    """Scratch and caches are used again and keep what was in them; none of it may come back."""
    _, student, batch, grad_output = drawn(2, (3, 45, 70), 40, 2)
    _, poison, poisoned, poison_grad = drawn(3, (2, 100, 130), 90, 2, 40)
    poison_moe = Student(
        poison.layer.with_matrices(lambda array: np.full_like(array, np.nan)), poison.lora, 40
    ).wrapper(2, full_weight_grad=True, lora_dropout=0.5)
    moe = student.wrapper(2, full_weight_grad=True)
    expected = train(moe, batch, grad_output)
    for num in (90, 1, 17):
        train(poison_moe, poisoned.rows(slice(num)), poison_grad[:num])
        train(moe, batch.rows(slice(num)), grad_output[:num])
        assert_same_steps(train(moe, batch, grad_output), expected)


# ---- what is kept ----


@law
@given(
    seeds,
    sizes,
    slots,
    st.sampled_from([0, 1, 16]),
    activations,
    st.sampled_from([{}, {"cache_dtype": np.float32}, {"lora_dropout": 0.3}]),
)
def test_recomputed_is_kept(
    seed: int, size: Any, num_slots: int, rank: int, activation: Any, options: dict[str, Any]
) -> None:
    _, student, batch, grad_output = drawn(seed, size, 30, num_slots, rank, activation)
    kept, recomputed = (
        train(student.wrapper(num_slots, full_weight_grad=True, recompute=how, **options), batch, grad_output)
        for how in (False, True)
    )
    assert_same_steps(recomputed, kept)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_cache_is_a_stack(recompute: bool, rate: float) -> None:
    rng, student, _, _ = drawn(4, (3, 45, 70), 1, 2)
    steps = [draw_training(rng, student, num, 2) for num in (20, 1, 0, 33, 20)]
    options = {"lora_dropout": rate, "recompute": recompute, "full_weight_grad": True}
    one = student.wrapper(2, **options)
    expected = [train(one, *step) for step in steps]
    moe = student.wrapper(2, max_cache_depth=4, **options)
    first = [moe.forward_sft(*batch, out=np.empty(batch.x.shape, np.float32)) for batch, _ in steps[:3]]
    got = {2: Step(first[2], by_name(moe.backward(steps[2][1])))}
    moe.step = 3
    first[2:] = [moe.forward_sft(*batch, out=np.empty(batch.x.shape, np.float32)) for batch, _ in steps[3:]]
    assert moe.num_cached == 4
    for i in (4, 3, 1, 0):
        got[i] = Step(first[i - (i > 2)], by_name(moe.backward(steps[i][1])))
    assert moe.num_cached == 0
    for i, step in enumerate(expected):
        assert_same_steps(got[i], step, f"step {i}")


def test_what_a_saved_pass_was_computed_from_may_change() -> None:
    rng, student, batch, grad_output = drawn(5, (3, 45, 70), 20, 2)
    for recompute in (False, True):
        moe = student.wrapper(2, recompute=recompute)
        expected = train(moe, batch, grad_output)
        arrays = Batch(*(array.copy() for array in batch))
        out = moe.forward_sft(*arrays, out=np.empty(batch.x.shape, np.float32))
        for array in arrays:
            array[...] = 0
        other = draw_student(rng, (3, 45, 70), 8)
        moe.update_lora_weights(**other.lora)
        moe.set_gpu_experts_mask(np.array([True, False, True]))
        moe.forward(*draw_batch(rng, student.layer, 40, 2))
        assert_same_steps(Step(out, by_name(moe.backward(grad_output))), expected)


def test_given_adapters_may_change() -> None:
    _, student, batch, grad_output = drawn(6, (3, 45, 70), 20, 2)
    given = {name: matrix.copy() for name, matrix in student.lora.items()}
    moe = Student(student.layer, given, 8).wrapper(2)
    expected = train(moe, batch, grad_output)
    for matrix in given.values():
        matrix[...] = 7.0
    assert_same_steps(train(moe, batch, grad_output), expected)
    for name, matrix in moe.lora_weights.items():
        assert_same_bits(matrix, student.lora[name])
        with pytest.raises(ValueError, match="read-only"):
            matrix[...] = 7.0
    moe.update_lora_weights(gate_lora_a=given["gate_lora_a"])
    assert not np.array_equal(moe.forward_sft(*batch), expected.out)


def test_dropout_repeats_with_its_step() -> None:
    _, student, batch, grad_output = drawn(7, (3, 45, 70), 20, 2)
    moe = student.wrapper(2, lora_dropout=0.5, seed=9)
    steps = [train(moe, batch, grad_output) for _ in range(3)]
    assert moe.step == 3
    assert not np.array_equal(steps[0].out, steps[1].out)
    moe.step = 1
    assert_same_steps(train(moe, batch, grad_output), steps[1])
    again = student.wrapper(2, lora_dropout=0.5, seed=9)
    again.forward(*batch)  # counts for nothing
    assert_same_steps(train(again, batch, grad_output), steps[0])
    assert_step_close(steps[2], student, batch, grad_output, dropout=Dropout(0.5, 9, 2))
    other = student.wrapper(2, lora_dropout=0.5, seed=8)
    assert not np.array_equal(train(other, batch, grad_output).out, steps[0].out)
    assert_same_bits(moe.forward(*batch), student.wrapper(2).forward(*batch))


# ---- how it is called ----


def test_submitted_is_as_called() -> None:
    _, student, batch, grad_output = drawn(8, (3, 45, 70), 30, 2)
    moe = student.wrapper(2, max_cache_depth=2)
    expected = train(moe, batch, grad_output)
    moe.submit_forward_sft(*batch)
    moe.submit_backward(grad_output)  # of the pass before it
    assert_same_bits(moe.sync_forward_sft(), expected.out.astype(bf16))
    assert_same_steps(Step(expected.out, by_name(moe.sync_backward())), expected)
    into = SFTGradients(np.empty(0), np.empty(0), down_lora_a=np.zeros_like(student.lora["down_lora_a"]))
    out = np.empty(batch.x.shape, np.float32)
    moe.submit_forward_sft(*batch, save_for_backward=True, out=out)
    assert moe.sync_forward_sft() is out
    moe.submit_backward(grad_output, gradients=into, accumulate=True)
    assert moe.sync_backward().down_lora_a is into.down_lora_a
    assert_same_bits(into.down_lora_a, expected.gradients["down_lora_a"])
    moe.submit_forward_sft(*batch, False)
    moe.sync_forward_sft()
    assert moe.num_cached == 0


def test_inference_and_training_from_many_threads() -> None:
    _, student, batch, grad_output = drawn(9, (3, 45, 70), 40, 2)
    inference = student.layer.wrapper(2)
    plain = inference.forward(*batch)
    expected = train(student.wrapper(2), batch, grad_output)
    shared, failures = student.wrapper(2, layer_idx=1), []
    adapted = shared.forward(*batch)

    def work(index: int) -> None:
        try:
            own = student.wrapper(2, layer_idx=2 + index, recompute=bool(index % 2))
            for _ in range(3 if IS_SLOW else 10):
                assert_same_steps(train(own, batch, grad_output), expected)
                assert_same_bits(inference.forward(*batch), plain)
                own.update_lora_weights(**student.lora)
                assert_same_bits(shared.forward(*batch), adapted)
                shared.update_lora_weights(**student.lora)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_gradients_of_one_layer_from_many_threads() -> None:
    """As many steps at once as there are slots: which backward meets which forward does not matter."""
    rng, student, batch, _ = drawn(10, (3, 45, 70), 20, 2)
    grads = [draw(rng, 20, 70) for _ in range(4)]
    moe = student.wrapper(2, max_cache_depth=4)
    expected = [train(moe, batch, grad) for grad in grads]
    got: dict[int, Step] = {}

    def work(index: int) -> None:
        got[index] = train(moe, batch, grads[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert moe.num_cached == 0
    for index, step in enumerate(expected):
        assert_same_steps(got[index], step)
