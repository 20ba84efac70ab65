"""Are the gradients right? The engine against the reference, within its roundings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import ACTIVATIONS, STORAGES, assert_same_bits, bf16, draw, draw_batch, num_examples, stored
from sft_layers import (
    SHAPES,
    Step,
    Student,
    assert_drawn_case,
    assert_same_steps,
    assert_step_close,
    by_name,
    draw_case,
    draw_student,
    draw_training,
    train,
)

pytestmark = [pytest.mark.kernels, pytest.mark.asan]

AnyArray = Any


@settings(deadline=None, max_examples=num_examples(100))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_drawn_layers(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(data, rng)
    cache_dtype = data.draw(st.sampled_from([bf16, np.dtype(np.float32)]), "cache")
    options = {
        "full_weight_grad": data.draw(st.booleans(), "full"),
        "recompute": data.draw(st.booleans(), "recompute"),
    }
    storage = data.draw(st.sampled_from(list(STORAGES)), "storage")
    layer = case.student.layer.with_matrices(lambda array: stored(array, storage))
    as_stored = replace(case.student, layer=layer)
    assert_drawn_case(case, as_stored, seed=seed, cache_dtype=cache_dtype, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str) -> None:
    num_experts, inter, hidden, rank, num_slots, num_tokens = SHAPES[shape]
    rng = np.random.default_rng(1)
    student = draw_student(rng, (num_experts, inter, hidden), rank, with_biases=True)
    batch = draw_batch(rng, student.layer, num_tokens, num_slots)
    grad_output = draw(rng, num_tokens, hidden)
    step = train(student.wrapper(num_slots, full_weight_grad=True), batch, grad_output)
    assert_step_close(step, student, batch, grad_output)


@pytest.mark.parametrize("float32_cache", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation: Any, float32_cache: bool) -> None:
    rng = np.random.default_rng(2)
    student = draw_student(rng, (3, 45, 70), 16, activation, scale=3.0)
    batch, grad_output = draw_training(rng, student, 30, 2)
    options = {"cache_dtype": np.float32} if float32_cache else {}
    step = train(student.wrapper(2, full_weight_grad=True, **options), batch, grad_output)
    assert_step_close(step, student, batch, grad_output, float32_cache=float32_cache)


# ---- what there is ----


@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("method", ["AMXBF16_SFT", "BF16_SFT", "AMXBF16_SFT_SkipLoRA", "BF16_SFT_SkipLoRA"])
def test_what_a_method_gives(activation: str, rank: int, full: bool, method: str) -> None:
    rng = np.random.default_rng(3)
    student = draw_student(rng, (3, 24, 40), rank, activation)
    batch, grad_output = draw_training(rng, student, 6, 2)
    skips = method.endswith("SkipLoRA")
    moe = student.wrapper(2, method=method, full_weight_grad=full and not skips)
    assert (type(moe).__name__, moe.method) == ("NativeSFTMoEWrapper", method)
    gradients = train(moe, batch, grad_output).gradients
    gate, up, down = student.layer.matrices
    shapes = {"grad_input": (6, 40), "grad_weights": (6, 2)}
    if not skips:
        shapes |= {name: matrix.shape for name, matrix in student.lora.items()}
        if full:
            shapes |= {"gate_proj": gate.shape, "down_proj": down.shape}
            shapes |= {} if up is None else {"up_proj": up.shape}
    assert {name: value.shape for name, value in gradients.items()} == shapes
    assert gradients.pop("grad_input").dtype == bf16
    assert {value.dtype for value in gradients.values()} == {np.dtype(np.float32)}


def test_options_leave_the_other_gradients_alone() -> None:
    rng = np.random.default_rng(4)
    student = draw_student(rng, (3, 45, 70), 16, with_biases=True)
    batch, grad_output = draw_training(rng, student, 20, 2)
    every = train(student.wrapper(2, full_weight_grad=True), batch, grad_output)
    for options in ({}, {"method": "BF16_SFT_SkipLoRA"}):
        some = train(student.wrapper(2, **options), batch, grad_output)
        kept = {name: every.gradients[name] for name in some.gradients}
        assert len(kept) == (2 if options else 8)
        assert_same_steps(some, Step(every.out, kept))


def test_an_empty_batch() -> None:
    rng = np.random.default_rng(5)
    student = draw_student(rng, (2, 16, 24), 4)
    batch, grad_output = draw_training(rng, student, 0, 2)
    gradients = train(student.wrapper(2, full_weight_grad=True), batch, grad_output).gradients
    assert gradients["grad_input"].shape == (0, 24)
    assert gradients["grad_weights"].shape == (0, 2)
    assert len(gradients) == 11
    assert not any(value.any() for value in gradients.values())


def test_experts_without_tokens_have_no_gradient() -> None:
    rng = np.random.default_rng(6)
    student = draw_student(rng, (5, 45, 70), 16)
    batch, grad_output = draw_training(rng, student, 20, 2)
    batch.ids[...] = np.where(batch.ids < 0, -1, 2 * (batch.ids % 2) + 1)
    gradients = train(student.wrapper(2, full_weight_grad=True), batch, grad_output).gradients
    for name, value in gradients.items():
        if name not in ("grad_input", "grad_weights"):
            assert not value[[0, 2, 4]].any(), name
            assert value[[1, 3]].any(axis=(1, 2)).all(), name


def test_skipped_slots_give_nothing() -> None:
    rng = np.random.default_rng(7)
    student = draw_student(rng, (4, 45, 70), 16)
    batch, grad_output = draw_training(rng, student, 20, 3)
    mask = np.array([True, False, False, True])
    hidden = (batch.ids < 0) | mask[batch.ids]
    moe = student.wrapper(3, full_weight_grad=True, gpu_experts_mask=mask)
    masked = train(moe, batch, grad_output)
    skipping = batch._replace(ids=np.where(hidden, -7, batch.ids))
    skipped = train(student.wrapper(3, full_weight_grad=True), skipping, grad_output)
    assert_same_steps(masked, skipped)
    assert not masked.gradients["grad_weights"][hidden].any()
    assert masked.gradients["grad_weights"][~hidden].all()
    assert not masked.gradients["gate_proj"][mask].any()


@pytest.mark.parametrize("order", [(3, 0, 1, 2), (2, 2, 0, 2)], ids=["permutation", "repeated"])
def test_a_map_gathers_weights_and_scatters_their_gradients(order: tuple[int, ...]) -> None:
    rng = np.random.default_rng(8)
    student = draw_student(rng, (4, 45, 70), 16, with_biases=True)
    batch, grad_output = draw_training(rng, student, 40, 2)
    mapped = np.array(order)
    moe = student.wrapper(2, mapped, full_weight_grad=True)
    step = train(moe, batch, grad_output)
    assert_step_close(step, student, batch, grad_output, physical_to_logical_map=mapped)
    unused = np.setdiff1d(np.arange(4), mapped)
    assert not step.gradients["gate_lora_a"][unused].any()
    if len(unused):
        return
    logical = batch._replace(ids=np.where(batch.ids < 0, -1, mapped[batch.ids]))
    named = train(student.wrapper(2, full_weight_grad=True), logical, grad_output)
    assert_same_steps(step, named)


def test_duplicate_ids_count_like_two_experts_with_the_same_weights() -> None:
    rng = np.random.default_rng(9)
    student = draw_student(rng, (2, 45, 70), 16)
    batch, grad_output = draw_training(rng, student, 25, 2)
    batch.ids[...] = rng.integers(0, 2, (25, 1))
    one = train(student.wrapper(2), batch, grad_output)
    assert_step_close(one, student, batch, grad_output)
    twice = np.array([0, 1, 0, 1])
    copied = Student(
        student.layer.picked(twice), {name: value[twice] for name, value in student.lora.items()}, 16
    )
    other = batch._replace(ids=batch.ids + 2 * rng.integers(0, 2, batch.ids.shape))
    both = train(copied.wrapper(2), other, grad_output)
    for name in ("grad_input", "grad_weights"):
        assert_same_bits(both.gradients[name], one.gradients[name])
    for name in student.lora:  # two sums, added up
        parts = both.gradients[name]
        np.testing.assert_allclose(parts[:2] + parts[2:], one.gradients[name], rtol=1e-4, atol=1e-4)


# ---- what is not finite ----


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("activation", ["silu", {"kind": "swiglustep", "limit": 0.5}, "relu2"], ids=str)
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"lora_dropout": 0.5}], ids=str)
def test_a_bad_token_spoils_its_row_and_its_experts(activation: Any, bad: float, options: Any) -> None:
    rng = np.random.default_rng(10)
    student = draw_student(rng, (4, 45, 70), 16, activation)
    batch, grad_output = draw_training(rng, student, 20, 2)
    batch.ids[7] = [1, -1]
    moe = student.wrapper(2, full_weight_grad=True, **options)
    clean = train(moe, batch, grad_output).gradients
    batch.x[7, 11] = bad
    moe.step = 0
    spoiled = train(moe, batch, grad_output).gradients
    others = np.arange(20) != 7
    for name, value in spoiled.items():
        if name in ("grad_input", "grad_weights"):
            assert_same_bits(value[others], clean[name][others], name)
        else:
            # Dropout takes the token out of some columns of h, which is all that this one has of it.
            partly = name == "down_lora_a" and "lora_dropout" in options
            assert np.isnan(value[1]).any() if partly else np.isnan(value[1]).all(), name
            assert_same_bits(value[[0, 2, 3]], clean[name][[0, 2, 3]], name)
    assert np.isnan(spoiled["grad_input"][7].astype(np.float32)).all()
    assert np.isnan(spoiled["grad_weights"][7]).tolist() == [True, False]
    assert spoiled["grad_weights"][7, 1] == 0


def test_a_bad_token_that_no_expert_takes_is_of_no_consequence() -> None:
    rng = np.random.default_rng(11)
    student = draw_student(rng, (3, 45, 70), 16)
    batch, grad_output = draw_training(rng, student, 20, 2)
    batch.ids[7] = -1
    clean = train(student.wrapper(2), batch, grad_output)
    batch.x[7] = np.nan
    batch.weights[7] = np.nan
    grad_output[7] = np.nan
    assert_same_steps(train(student.wrapper(2), batch, grad_output), clean)


def test_a_bad_gradient_stays_in_its_row_and_its_experts() -> None:
    rng = np.random.default_rng(12)
    student = draw_student(rng, (4, 45, 70), 16)
    batch, grad_output = draw_training(rng, student, 20, 2)
    batch.ids[7] = [1, 1]
    moe = student.wrapper(2, full_weight_grad=True)
    clean = train(moe, batch, grad_output).gradients
    grad_output[7, 5] = np.inf
    spoiled = train(moe, batch, grad_output).gradients
    others = np.arange(20) != 7
    for name, value in spoiled.items():
        rest = others if name in ("grad_input", "grad_weights") else [0, 2, 3]
        assert_same_bits(value[rest], clean[name][rest], name)
    assert not np.isfinite(spoiled["grad_weights"][7]).any()


def test_the_gradients_have_no_gaps() -> None:
    """Every element is written, whatever the arrays held."""
    rng = np.random.default_rng(13)
    for activation in ("silu", "relu2"):
        student = draw_student(rng, (3, 45, 70), 3, activation)
        batch, grad_output = draw_training(rng, student, 9, 2)
        moe = student.wrapper(2, full_weight_grad=True, max_cache_depth=2)
        first = train(moe, batch, grad_output)
        moe.forward_sft(*batch)
        used = moe.backward(grad_output)
        for value in by_name(used).values():
            value[...] = np.nan
        moe.forward_sft(*batch)
        again = moe.backward(grad_output, gradients=used)
        assert again.matrices.keys() == used.matrices.keys()
        for name, value in used.matrices.items():
            assert again.matrices[name] is value
        assert_same_steps(Step(first.out, by_name(again)), first)


def test_arrays_for_the_gradients_of_the_input() -> None:
    rng = np.random.default_rng(9)
    student = draw_student(rng, (4, 48, 64), 3)
    batch, grad_output = draw_training(rng, student, 7, 2)
    moe = student.wrapper(2)
    expected = train(moe, batch, grad_output)
    into = {"grad_input": np.empty_like(batch.x), "grad_weights": np.empty_like(batch.weights)}
    step = train(moe, batch, grad_output, **into)
    assert_same_steps(step, expected)
    for name, array in into.items():
        assert step.gradients[name] is array


def test_a_pass_that_is_not_saved_keeps_the_memory_of_the_next() -> None:
    rng = np.random.default_rng(10)
    student = draw_student(rng, (4, 48, 64), 3)
    batch, grad_output = draw_training(rng, student, 7, 2)
    moe = student.wrapper(2)
    train(moe, batch, grad_output)
    held = moe.cache_bytes
    moe.forward(*batch)
    assert (moe.num_cached, moe.cache_bytes) == (0, held)
    moe.clear_cache()
    assert moe.cache_bytes == 0
