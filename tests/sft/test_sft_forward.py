"""Is the forward pass of training right? The engine against the reference, within its roundings."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
from array_kinds import numpy_of, of_torch
from gradient_bound import gradient_balls
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import ACTIVATIONS, STORAGES, Batch, assert_same_bits, bf16, draw_batch, num_examples, stored
from sft_layers import SHAPES, Student, draw_case, draw_student, draw_training

import ktmoe_np.buffers
import ktmoe_np.experts
import ktmoe_np.layers.numbers
import ktmoe_np.sft.base
import ktmoe_np.sft.lora
import ktmoe_np.sft.options
import ktmoe_np.sft.peft.read
import ktmoe_np.sft.peft.write
from ktmoe_np.reference import Dropout, assert_within

pytestmark = pytest.mark.kernels

AnyArray = Any

BAD_NUMBERS = (np.nan, np.inf, -np.inf)


def test_doctests() -> None:
    sft, numbers = ktmoe_np.sft, ktmoe_np.layers.numbers
    of_sft = sft.base, sft.lora, sft.options, sft.peft.read, sft.peft.write
    for module in (ktmoe_np.buffers, ktmoe_np.experts, *of_sft, numbers):
        assert doctest.testmod(module).failed == 0


def assert_close(actual: AnyArray, student: Student, batch: Batch, **options: Any) -> None:
    """`actual` is what the reference says, to the roundings; options are those of `Student.reference`."""
    ball = gradient_balls(student.reference(batch, **options), np.zeros_like(batch.x), rounded=True)
    name = "out" if actual.dtype == bf16 else "float32 out"
    assert_within(actual, ball[name].center, ball[name].radius)


@settings(deadline=None, max_examples=num_examples(100))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_drawn_layers(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    student, batch, _, num_slots, mask, mapped, rate = draw_case(data, rng)
    saved = data.draw(st.booleans(), "saved")
    out = np.empty(batch.x.shape, data.draw(st.sampled_from([bf16, np.dtype(np.float32)]), "out"))
    storage = data.draw(st.sampled_from(list(STORAGES)), "storage")

    as_stored = Student(
        student.layer.with_matrices(lambda array: stored(array, storage)),
        student.lora,
        student.rank,
        student.lora_alpha,
    )
    key = {"seed": seed, "layer_idx": seed % 5}
    moe = as_stored.wrapper(num_slots, mapped, gpu_experts_mask=mask, lora_dropout=rate, **key)
    moe.step = step = seed // 3
    assert moe.forward_sft(*batch, save_for_backward=saved, out=out) is out
    dropout = Dropout(rate, seed, step, seed % 5) if saved and rate else None
    assert_close(out, student, batch, gpu_experts_mask=mask, physical_to_logical_map=mapped, dropout=dropout)
    assert (moe.num_cached, moe.step) == (saved, step + saved)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str) -> None:
    num_experts, inter, hidden, rank, num_slots, num_tokens = SHAPES[shape]
    rng = np.random.default_rng(1)
    student = draw_student(rng, (num_experts, inter, hidden), rank, with_biases=True)
    batch = draw_batch(rng, student.layer, num_tokens, num_slots)
    moe = student.wrapper(num_slots, max_cache_depth=2)
    for saved in (False, True):
        out = np.empty(batch.x.shape, np.float32)
        assert_close(moe.forward_sft(*batch, saved, out=out), student, batch)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation: Any) -> None:
    rng = np.random.default_rng(2)
    student = draw_student(rng, (3, 45, 70), 16, activation, scale=3.0)
    batch = draw_batch(rng, student.layer, 30, 2)
    out = student.wrapper(2).forward_sft(*batch, out=np.empty(batch.x.shape, np.float32))
    assert_close(out, student, batch)


def test_an_empty_batch() -> None:
    rng = np.random.default_rng(3)
    student = draw_student(rng, (2, 16, 24), 4)
    moe = student.wrapper(2)
    for saved in (False, True):
        result = moe.forward_sft(*draw_batch(rng, student.layer, 0, 2), saved)
        assert (result.dtype, result.shape, moe.num_cached) == (bf16, (0, 24), saved)


@pytest.mark.parametrize("bad", BAD_NUMBERS)
@pytest.mark.parametrize("activation", ["silu", {"kind": "swiglustep", "limit": 0.5}, "relu2"], ids=str)
def test_a_bad_number_stays_in_its_row(activation: Any, bad: float) -> None:
    rng = np.random.default_rng(4)
    student = draw_student(rng, (3, 45, 70), 16, activation)
    batch = draw_batch(rng, student.layer, 20, 2)
    moe = student.wrapper(2, lora_dropout=0.5)
    clean = moe.forward_sft(*batch)
    batch.x[7, 11] = bad
    moe.clear_cache()
    moe.step = 0
    result = moe.forward_sft(*batch)
    assert np.isnan(result[7].astype(np.float32)).all()
    others = np.arange(20) != 7
    assert_same_bits(result[others], clean[others])


def test_bad_numbers_in_an_adapter_reach_its_expert_alone() -> None:
    rng = np.random.default_rng(5)
    student = draw_student(rng, (3, 45, 70), 16)
    batch = draw_batch(rng, student.layer, 20, 1)
    moe = student.wrapper(1)
    clean = moe.forward(*batch)
    matrix = student.lora["down_lora_b"].copy()
    matrix[1, 3, 2] = np.nan
    moe.update_lora_weights(down_lora_b=matrix)
    assert np.isnan(moe.lora_weights["down_lora_b"][1, 3, 2])
    result, hit = moe.forward(*batch), batch.ids[:, 0] == 1
    assert np.isnan(result[hit, 3].astype(np.float32)).all()
    assert_same_bits(result[~hit], clean[~hit])


# ---- adapters ----


def test_adapters_are_computed_with_in_bfloat16() -> None:
    rng = np.random.default_rng(6)
    student = draw_student(rng, (3, 45, 70), 16)
    batch = draw_batch(rng, student.layer, 20, 2)
    rounded = {name: matrix.astype(bf16) for name, matrix in student.lora.items()}
    assert any((rounded[name].astype(np.float32) != student.lora[name]).any() for name in rounded)
    result = student.wrapper(2).forward(*batch)
    assert_same_bits(Student(student.layer, rounded, 16).wrapper(2).forward(*batch), result)


def test_adapters_may_lie_in_memory_as_they_like() -> None:
    rng = np.random.default_rng(7)
    student = draw_student(rng, (3, 45, 70), 16)
    batch = draw_batch(rng, student.layer, 20, 2)
    expected = student.wrapper(2).forward(*batch)
    for change in (
        lambda matrix: np.asfortranarray(matrix),
        lambda matrix: np.repeat(matrix, 2, axis=2)[:, :, ::2],
        lambda matrix: matrix[::-1].copy()[::-1],
        lambda matrix: stored(matrix, "read-only"),
    ):
        moved = {name: change(matrix) for name, matrix in student.lora.items()}
        assert_same_bits(Student(student.layer, moved, 16).wrapper(2).forward(*batch), expected)


def test_the_first_adapters() -> None:
    rng = np.random.default_rng(8)
    student = draw_student(rng, (3, 45, 70), 0)
    moe = student.wrapper(2, lora_rank=8, seed=2**63 + 1, layer_idx=3)
    first = moe.lora_weights
    for name, fan_in in (("gate_lora_a", 70), ("up_lora_a", 70), ("down_lora_a", 45)):
        matrix, bound = first[name], fan_in**-0.5
        assert (matrix.dtype, matrix.shape) == (np.float32, (3, 8, fan_in))
        assert np.abs(matrix).max() <= bound * (1 + 1e-6)
        assert 0.9 * bound < np.abs(matrix).max()
        assert abs(matrix.mean()) < 0.1 * bound
        assert abs(matrix.std() / bound - 3**-0.5) < 0.03
        assert not first[name.replace("_a", "_b")].any()
    assert not np.array_equal(first["gate_lora_a"], first["up_lora_a"])
    for options, same in (({}, True), ({"seed": 1}, False), ({"layer_idx": 4}, False)):
        again = student.wrapper(2, **{"lora_rank": 8, "seed": 2**63 + 1, "layer_idx": 3, **options})
        assert np.array_equal(again.lora_weights["gate_lora_a"], first["gate_lora_a"]) == same


def test_given_and_drawn_adapters_beside_each_other() -> None:
    rng = np.random.default_rng(9)
    student = draw_student(rng, (3, 45, 70), 4)
    drawn = Student(student.layer, {}, 4).wrapper(2).lora_weights
    given = {name: student.lora[name] for name in ("gate_lora_a", "down_lora_b")}
    for how in ("init_lora_weights", "update_lora_weights"):
        moe = student.layer.wrapper(2, mode="sft", method="BF16_SFT", lora_rank=4)
        getattr(moe, how)(**given)
        assert list(moe.lora_weights) == list(student.lora)
        for name, matrix in moe.lora_weights.items():
            assert_same_bits(matrix, given.get(name, drawn[name]))
    moe.init_lora_weights()  # all of them again
    for name, matrix in moe.lora_weights.items():
        assert_same_bits(matrix, drawn[name])


def test_a_pass_without_first_adapters_draws_them() -> None:
    rng = np.random.default_rng(10)
    student = draw_student(rng, (3, 45, 70), 4)
    batch, grad_output = draw_training(rng, student, 20, 2)
    moe = student.layer.wrapper(2, mode="sft", method="BF16_SFT", lora_rank=4)
    inference = student.layer.forward(batch)
    assert_same_bits(moe.forward(*batch), inference)
    assert_same_bits(moe.forward_sft(*batch), inference)
    assert moe.backward(grad_output).gate_lora_b.any()
    moe.update_lora_weights(gate_lora_b=student.lora["gate_lora_b"])
    assert not np.array_equal(moe.forward(*batch), inference)


# ---- inputs ----


@pytest.mark.parametrize("dtype", ["i1", "i4", "u2", "u8", ">i8"])
def test_ids_of_any_integer_dtype(dtype: str) -> None:
    rng = np.random.default_rng(11)
    student = draw_student(rng, (5, 16, 24), 4)
    batch = draw_batch(rng, student.layer, 6, 2)
    moe = student.wrapper(2)
    expected = moe.forward(*batch)
    ids = np.asfortranarray(batch.ids.astype(dtype))
    weights = np.asfortranarray(batch.weights)
    assert_same_bits(moe.forward_sft(batch.x, ids, weights), expected)


def test_inputs_are_never_written() -> None:
    rng = np.random.default_rng(12)
    student = draw_student(rng, (3, 45, 70), 16, with_biases=True)
    batch, grad_output = draw_training(rng, student, 20, 2)
    layer = student.layer
    arrays = [*batch, grad_output, *layer.matrices, *layer.biases.values(), *student.lora.values()]
    copies = [array.copy() for array in arrays]
    for array in arrays:
        array.setflags(write=False)
    moe = student.wrapper(2, full_weight_grad=True)
    for _ in range(2):
        moe.submit_forward_sft(*batch)
        moe.sync_forward_sft()
        moe.backward(grad_output)
    for array, copy in zip(arrays, copies, strict=True):
        assert_same_bits(array, copy)


@pytest.mark.crosscheck
def test_arrays_of_torch() -> None:
    pytest.importorskip("torch")
    rng = np.random.default_rng(13)
    student = draw_student(rng, (3, 45, 70), 16, dtype=bf16)
    batch, grad_output = draw_training(rng, student, 20, 2)

    moe = student.wrapper(2)
    expected, gradients = moe.forward_sft(*batch), moe.backward(grad_output)
    theirs = Student(
        student.layer.with_matrices(of_torch),
        {name: of_torch(matrix) for name, matrix in student.lora.items()},
        16,
    ).wrapper(2)
    for name, matrix in theirs.lora_weights.items():
        assert_same_bits(matrix, student.lora[name])
    assert_same_bits(numpy_of(theirs.forward_sft(*(of_torch(array) for array in batch))), expected)
    again = theirs.backward(of_torch(grad_output))
    assert_same_bits(numpy_of(again.grad_input), gradients.grad_input)
    assert_same_bits(numpy_of(again.down_lora_a), gradients.down_lora_a)
