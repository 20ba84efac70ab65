"""Is training right on weights in a checkpoint's own encoding? The reference, and laws to the bit."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import ACTIVATIONS, IS_SLOW, Batch, assert_same_bits, bf16
from native_layers import METHODS as INFERENCE_METHODS
from native_layers import NativeLayer, draw_native_layer
from sft_layers import (
    Student,
    assert_drawn_case,
    assert_same_steps,
    assert_step_close,
    draw_case,
    draw_lora,
    draw_training,
    joined,
    per_matrix,
    train,
)

from ktmoe_np import SFTGradients

AnyArray = Any

METHODS = tuple(f"{name}_SFT" for name in INFERENCE_METHODS)
every_method = pytest.mark.parametrize("method", METHODS)

law = settings(deadline=None, max_examples=2 if IS_SLOW else 8)
seeds = st.integers(0, 2**32 - 1)
#: E, I, H, among them tails of groups of 16, 32 and 128, and rows beyond the first block of 128.
sizes = st.sampled_from([(3, 45, 70), (4, 33, 31), (2, 64, 130), (2, 140, 48)])
slots = st.integers(1, 3)
ranks = st.sampled_from([0, 1, 3, 16])
activations = st.sampled_from(ACTIVATIONS)


def inference_name(method: str) -> str:
    return method.partition("_SFT")[0]


def native_student(
    rng: np.random.Generator, method: str, size: tuple[int, int, int], rank: int, activation: Any = "silu"
) -> Student:
    with_biases = bool(rng.integers(2))
    layer = draw_native_layer(rng, inference_name(method), *size, activation, with_biases=with_biases)
    return Student(layer, draw_lora(rng, layer, rank) if rank else {}, rank, 5.0, (method, None))


def drawn(
    seed: int,
    method: str,
    size: tuple[int, int, int] = (3, 45, 130),
    num_tokens: int = 20,
    num_slots: int = 2,
    rank: int = 8,
    activation: Any = "silu",
) -> tuple[Student, Batch, AnyArray]:
    rng = np.random.default_rng(seed)
    student = native_student(rng, method, size, rank, activation)
    return student, *draw_training(rng, student, num_tokens, num_slots)


def inference(student: Student, num_slots: int, *args: Any, **options: Any) -> Any:
    """The layer without adapters, by the method for inference."""
    return student.layer.wrapper(num_slots, *args, method=inference_name(student.method[0]), **options)


def on_native(rng: np.random.Generator, student: Student) -> Student:
    """The student with its adapters on a layer of its sizes in its method's encoding."""
    plain, method = student.layer, inference_name(student.method[0])
    size = (plain.num_experts, plain.inter_size, plain.hidden_size)
    with_biases = plain.down_bias is not None
    layer = draw_native_layer(rng, method, *size, plain.activation, with_biases=with_biases)
    return replace(student, layer=layer)


# ---- against the reference ----


@settings(deadline=None, max_examples=50 if IS_SLOW else 250)
@given(data=st.data(), seed=seeds)
def test_drawn_layers(data: st.DataObject, seed: int) -> None:
    """Of any ranks, activations, maps, masks and dropout."""
    rng = np.random.default_rng(seed)
    case = draw_case(data, rng, [(method, None) for method in METHODS])
    case = case._replace(student=on_native(rng, case.student))
    cache_dtype = data.draw(st.sampled_from([bf16, np.dtype(np.float32)]), "cache")
    recompute = data.draw(st.booleans(), "recompute")
    assert_drawn_case(case, case.student, seed=seed, cache_dtype=cache_dtype, recompute=recompute)


@every_method
@pytest.mark.parametrize("num_tokens", [1, 9, 40])
@pytest.mark.parametrize("size", [(2, 704, 96), (1, 33, 2081)])
def test_widths_of_models(method: str, num_tokens: int, size: tuple[int, int, int]) -> None:
    student, batch, grad_output = drawn(1, method, size, num_tokens)
    batch.ids[...] = np.arange(batch.ids.size).reshape(batch.ids.shape) % size[0]  # none is skipped
    assert_step_close(train(student.wrapper(2), batch, grad_output), student, batch, grad_output)


# ---- laws ----


@every_method
@law
@given(seeds, sizes, slots, activations, st.sampled_from([1, 9, 40]), st.booleans())
def test_without_adapters_training_is_inference(
    method: str, seed: int, size: Any, num_slots: int, activation: Any, num_tokens: int, saved: bool
) -> None:
    student, batch, _ = drawn(seed, method, size, num_tokens, num_slots, 0, activation)
    rng, num_experts = np.random.default_rng(seed), student.layer.num_experts
    mapped, mask = rng.integers(0, num_experts, num_experts), rng.random(num_experts) < 0.3
    plain = inference(student, num_slots, mapped, gpu_experts_mask=mask)
    moe = student.wrapper(num_slots, mapped, gpu_experts_mask=mask, max_cache_depth=2)
    for dtype in (np.float32, bf16):
        out = np.empty(batch.x.shape, dtype)
        expected = plain.forward(*batch, out=out.copy())
        assert_same_bits(moe.forward_sft(*batch, saved, out=out), expected)


@every_method
@law
@given(seeds, sizes, slots, ranks, activations, st.sampled_from([bf16, np.float32]), st.booleans())
def test_recomputed_passes_have_the_same_bits(
    method: str,
    seed: int,
    size: Any,
    num_slots: int,
    rank: int,
    activation: Any,
    cache_dtype: Any,
    drops: bool,
) -> None:
    student, batch, grad_output = drawn(seed, method, size, 30, num_slots, rank, activation)
    options = {"cache_dtype": cache_dtype, "lora_dropout": 0.3 if drops else 0.0}
    kept, recomputed = (
        train(student.wrapper(num_slots, recompute=how, **options), batch, grad_output)
        for how in (False, True)
    )
    assert_same_steps(recomputed, kept)


@every_method
@law
@given(seeds, sizes, slots, ranks, activations)
def test_a_token_alone_is_as_in_the_batch(
    method: str, seed: int, size: Any, num_slots: int, rank: int, activation: Any
) -> None:
    student, batch, grad_output = drawn(seed, method, size, 40, num_slots, rank, activation)
    moe = student.wrapper(num_slots)
    whole = train(moe, batch, grad_output)
    order = np.random.default_rng(seed).permutation(40)
    for rows in (slice(0, 1), slice(39, 40), slice(5, 14), order):
        part = train(moe, batch.rows(rows), grad_output[rows].copy())
        assert_same_bits(part.out, whole.out[rows])
        for name in ("grad_input", "grad_weights"):
            assert_same_bits(part.gradients[name], whole.gradients[name][rows], name)


@every_method
@law
@given(seeds, sizes, slots, ranks, st.integers(0, 30))
def test_gradients_add_over_micro_batches(
    method: str, seed: int, size: Any, num_slots: int, rank: int, first: int
) -> None:
    student, batch, grad_output = drawn(seed, method, size, 30, num_slots, rank)
    moe = student.wrapper(num_slots)
    parts = [train(moe, batch.rows(rows), grad_output[rows]) for rows in (slice(first), slice(first, None))]
    assert_step_close(joined(parts), student, batch, grad_output)


@every_method
def test_accumulated_gradients_are_added_to_those_that_are_there(method: str) -> None:
    student, batch, grad_output = drawn(8, method)
    moe = student.wrapper(2)
    parts = [slice(0, 1), slice(1, 10), slice(10, 20)]
    alone = [per_matrix(train(moe, batch.rows(part), grad_output[part])) for part in parts]
    first = {name: np.ones(matrix.shape, np.float32) for name, matrix in student.lora.items()}
    none = np.empty(0, np.float32)
    into = SFTGradients(none, none, **{name: value.copy() for name, value in first.items()})
    for part in parts:
        train(moe, batch.rows(part), grad_output[part], gradients=into, accumulate=True)
    for name, value in first.items():
        for gradients in alone:
            value = value + gradients[name]  # in the order of the passes, as float32 sums round
        assert_same_bits(into.matrices[name], value, name)


@every_method
def test_an_expert_that_another_map_names_is_that_expert(method: str) -> None:
    student, batch, grad_output = drawn(9, method, (4, 45, 130))
    order = np.array([2, 0, 3, 1])
    step = train(student.wrapper(2, order), batch, grad_output)
    logical = batch._replace(ids=np.where(batch.ids < 0, -1, order[batch.ids]))
    assert_same_steps(step, train(student.wrapper(2), logical, grad_output))


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


# ---- what a method gives ----


@every_method
@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("rank", [0, 8])
def test_skipping_the_adapters_leaves_the_other_gradients(method: str, activation: Any, rank: int) -> None:
    student, batch, grad_output = drawn(5, method, rank=rank, activation=activation)
    whole = train(student.wrapper(2), batch, grad_output)
    skipping = train(student.wrapper(2, method=f"{method}_SkipLoRA"), batch, grad_output)
    assert_same_bits(skipping.out, whole.out)
    assert set(skipping.gradients) == {"grad_input", "grad_weights"}
    for name, value in skipping.gradients.items():
        assert_same_bits(value, whole.gradients[name], name)


@pytest.mark.parametrize("suffix", ["", "_SkipLoRA"])
def test_fp8_trains_by_two_names(suffix: str) -> None:
    student, batch, grad_output = drawn(6, "FP8_SFT")
    step = train(student.wrapper(2, method=f"FP8_SFT{suffix}"), batch, grad_output)
    assert_same_steps(train(student.wrapper(2, method=f"AMXFP8_SFT{suffix}"), batch, grad_output), step)


@every_method
def test_experts_are_as_large_as_for_inference(method: str) -> None:
    student, _, _ = drawn(10, method)
    moe, layer = student.wrapper(2), student.layer
    assert isinstance(layer, NativeLayer)
    given = sum(array.nbytes for array in layer.arguments.values())
    assert moe.expert_bytes == inference(student, 2).expert_bytes == given // layer.num_experts


@every_method
def test_gradients_of_the_weights_are_refused(method: str) -> None:
    student, _, _ = drawn(7, method)
    weights = inference_name(method).lower()
    why = f"the base weights of method '{method}' are {weights}, and only those in bf16 have gradients"
    skipping = f"method '{method}_SkipLoRA' has no gradients of weights"
    for name, reason in ((method, why), (f"{method}_SkipLoRA", skipping)):
        message = f"full_weight_grad: got True, expected False: {reason}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            student.wrapper(2, method=name, full_weight_grad=True)
