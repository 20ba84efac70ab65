"""Is training right on weights in a checkpoint's own encoding? The reference, and laws to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import ACTIVATIONS, IS_SLOW, Batch, assert_same_bits
from native_layers import METHODS as INFERENCE_METHODS
from native_layers import draw_native_layer
from sft_layers import (
    RANKS,
    SIZES,
    TOKENS,
    Student,
    assert_same_steps,
    assert_step_close,
    draw_lora,
    draw_training,
    joined,
    per_matrix,
    train,
)

AnyArray = Any

METHODS = tuple(f"{name}_SFT" for name in INFERENCE_METHODS)
every_method = pytest.mark.parametrize("method", METHODS)


def native_student(
    rng: np.random.Generator, method: str, size: tuple[int, int, int], rank: int, activation: Any = "silu"
) -> Student:
    inference = method.partition("_SFT")[0]
    layer = draw_native_layer(rng, inference, *size, activation, with_biases=bool(rng.integers(2)))
    return Student(layer, draw_lora(rng, layer, rank) if rank else {}, rank, 5.0, (method, None))


def drawn(
    seed: int, method: str, size: tuple[int, int, int] = (3, 45, 130), num_tokens: int = 20, rank: int = 8
) -> tuple[Student, Batch, AnyArray]:
    rng = np.random.default_rng(seed)
    student = native_student(rng, method, size, rank)
    return student, *draw_training(rng, student, num_tokens, 2)


@settings(deadline=None, max_examples=30 if IS_SLOW else 150)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_drawn_layers(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    method = data.draw(st.sampled_from(METHODS), "method")
    size = tuple(data.draw(st.sampled_from(SIZES), name) for name in ("I", "H"))
    rank = data.draw(st.sampled_from(RANKS), "R")
    activation = data.draw(st.sampled_from(ACTIVATIONS), "activation")
    student = native_student(rng, method, (data.draw(st.integers(1, 4), "E"), *size), rank, activation)
    num_slots = data.draw(st.integers(1, 3), "P")
    batch, grad_output = draw_training(rng, student, data.draw(st.sampled_from(TOKENS), "T"), num_slots)
    step = train(student.wrapper(num_slots), batch, grad_output)
    assert_step_close(step, student, batch, grad_output)


@every_method
@pytest.mark.parametrize("num_tokens", [1, 9, 40])
@pytest.mark.parametrize("size", [(2, 704, 96), (1, 33, 2081)])
def test_widths_of_models(method: str, num_tokens: int, size: tuple[int, int, int]) -> None:
    student, batch, grad_output = drawn(1, method, size, num_tokens)
    assert_step_close(train(student.wrapper(2), batch, grad_output), student, batch, grad_output)


@every_method
def test_without_adapters_training_is_inference(method: str) -> None:
    student, batch, _ = drawn(2, method, rank=0)
    trained = student.wrapper(2).forward_sft(*batch)
    inference = student.layer.wrapper(2, method=method.partition("_SFT")[0]).forward(*batch)
    assert_same_bits(trained, inference)


@every_method
def test_recomputed_passes_have_the_same_bits(method: str) -> None:
    student, batch, grad_output = drawn(3, method)
    kept = train(student.wrapper(2), batch, grad_output)
    assert_same_steps(train(student.wrapper(2, recompute=True), batch, grad_output), kept)


@every_method
def test_tokens_alone_have_the_bits_of_the_batch_and_gradients_of_matrices_add(method: str) -> None:
    student, batch, grad_output = drawn(4, method)
    moe = student.wrapper(2)
    whole = train(moe, batch, grad_output)
    parts = [slice(0, 1), slice(1, 12), slice(12, 20)]
    together = joined([train(moe, batch.rows(part), grad_output[part]) for part in parts])
    assert_same_bits(together.out, whole.out)
    for name in ("grad_input", "grad_weights"):
        assert_same_bits(together.gradients[name], whole.gradients[name], name)
    for name, value in per_matrix(whole).items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(
            together.gradients[name], value, rtol=1e-3, atol=1e-5 * scale, err_msg=name
        )


@every_method
def test_skipping_the_adapters_leaves_the_other_gradients(method: str) -> None:
    student, batch, grad_output = drawn(5, method)
    whole = train(student.wrapper(2), batch, grad_output)
    skipping = train(student.wrapper(2, method=f"{method}_SkipLoRA"), batch, grad_output)
    assert set(skipping.gradients) == {"grad_input", "grad_weights"}
    for name, value in skipping.gradients.items():
        assert_same_bits(value, whole.gradients[name], name)


def test_fp8_trains_by_two_names() -> None:
    student, batch, grad_output = drawn(6, "FP8_SFT")
    step = train(student.wrapper(2), batch, grad_output)
    assert_same_steps(train(student.wrapper(2, method="AMXFP8_SFT"), batch, grad_output), step)


@every_method
def test_gradients_of_the_weights_are_refused(method: str) -> None:
    student, _, _ = drawn(7, method)
    with pytest.raises(ValueError, match=r"full_weight_grad: .* and only"):
        student.wrapper(2, full_weight_grad=True)
