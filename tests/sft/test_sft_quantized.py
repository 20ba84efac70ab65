"""Is training right on weights that are not bf16? The engine against the reference, and laws to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import ACTIVATIONS, Batch, assert_same_bits, bf16, draw, draw_batch, num_examples
from native_layers import METHODS as NATIVE_METHODS
from quantized_layers import METHODS as INFERENCE_METHODS
from sft_layers import (
    SHAPES,
    THREAD_CASES,
    Method,
    Step,
    Student,
    assert_drawn_case,
    assert_same_on_any_threads,
    assert_same_steps,
    assert_step_close,
    assert_tokens_alone_are_as_in_batch,
    draw_case,
    draw_student,
    draw_training,
    joined,
    train,
)

from ktmoe_np import SFTGradients
from ktmoe_np.formats.methods import find_method

pytestmark = pytest.mark.kernels

AnyArray = Any

QUANTIZED: tuple[Method, ...] = tuple((f"{name}_SFT", size) for name, size in INFERENCE_METHODS)
#: Those that quantize, and those that read a checkpoint's own encoding.
WRAPPERS = {"LLAMAFILE_SFT": "LlamafileSFTMoEWrapper"}

METHODS: tuple[Method, ...] = (*QUANTIZED, *((f"{name}_SFT", None) for name in NATIVE_METHODS))


def name_of(method: Method) -> str:
    return ", ".join(str(part) for part in method if part is not None)


every_method = pytest.mark.parametrize("method", METHODS, ids=name_of)

law = settings(deadline=None, max_examples=num_examples(8))
seeds = st.integers(0, 2**32 - 1)
#: E, I, H, among them tails of groups and of steps of the kernels, and rows beyond the first block of 128.
sizes = st.sampled_from([(3, 45, 70), (4, 33, 31), (2, 64, 130), (6, 96, 160), (2, 140, 48)])
ranks = st.sampled_from([0, 1, 3, 16])
slots = st.integers(1, 3)
activations = st.sampled_from(ACTIVATIONS)


def drawn(
    seed: int,
    method: Method,
    size: tuple[int, int, int] = (3, 45, 130),
    num_tokens: int = 20,
    num_slots: int = 2,
    rank: int = 8,
    activation: Any = "silu",
) -> tuple[np.random.Generator, Student, Batch, AnyArray]:
    rng = np.random.default_rng(seed)
    with_biases = bool(rng.integers(2))
    student = draw_student(rng, size, rank, activation, method=method, with_biases=with_biases)
    return rng, student, *draw_training(rng, student, num_tokens, num_slots)


def inference(student: Student, num_slots: int, *args: Any, **options: Any) -> Any:
    """The layer without adapters, by the method for inference."""
    name, group_size = student.method
    name = name.removesuffix("_SFT")
    return student.layer.wrapper(num_slots, *args, method=name, group_size=group_size, **options)


# ---- against the reference ----


@settings(deadline=None, max_examples=num_examples(500))
@given(data=st.data(), seed=seeds)
def test_drawn_layers(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = draw_case(data, rng, METHODS)
    cache_dtype = data.draw(st.sampled_from([bf16, np.dtype(np.float32)]), "cache")
    recompute = data.draw(st.booleans(), "recompute")
    assert_drawn_case(case, case.student, seed=seed, cache_dtype=cache_dtype, recompute=recompute)


@every_method
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, method: Method) -> None:
    num_experts, inter, hidden, rank, num_slots, num_tokens = SHAPES[shape]
    rng = np.random.default_rng(1)
    student = draw_student(rng, (num_experts, inter, hidden), rank, method=method, with_biases=True)
    batch = draw_batch(rng, student.layer, num_tokens, num_slots)
    grad_output = draw(rng, *batch.x.shape)
    assert_step_close(train(student.wrapper(num_slots), batch, grad_output), student, batch, grad_output)


@pytest.mark.parametrize("method", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_rows_of_zeros(activation: str, method: Method) -> None:
    """Of weights, of activations, of gradients: scales that are zero divide nothing."""
    _, student, batch, grad_output = drawn(2, method, activation=activation)
    gate, up, down = student.layer.matrices
    gate[0, 3], gate[1], down[0, 7], down[2] = 0, 0, 0, 0
    if up is not None:
        up[0, 5] = 0
    batch.x[1], batch.weights[2], grad_output[3] = 0, 0, 0
    step = train(student.wrapper(2), batch, grad_output)
    assert_step_close(step, student, batch, grad_output)
    assert not step.gradients["grad_input"][3].any()
    assert not step.gradients["grad_weights"][3].any()


@every_method
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["hidden_states", "grad_output"])
def test_a_row_that_is_not_finite_spoils_itself_and_its_experts(
    method: Method, bad: float, where: str
) -> None:
    rng = np.random.default_rng(3)
    student = draw_student(rng, (4, 45, 130), 16, method=method)
    batch, grad_output = draw_training(rng, student, 20, 2)
    batch.ids[7] = [1, -1]
    moe = student.wrapper(2)
    clean = train(moe, batch, grad_output)
    (batch.x if where == "hidden_states" else grad_output)[7, 11] = bad
    spoiled = train(moe, batch, grad_output)
    others = np.arange(20) != 7
    assert_same_bits(spoiled.out[others], clean.out[others])
    assert np.isnan(spoiled.out[7]).all() == (where == "hidden_states")
    for name, value in spoiled.gradients.items():
        rest = others if name in ("grad_input", "grad_weights") else [0, 2, 3]
        assert_same_bits(value[rest], clean.gradients[name][rest], name)
    assert not np.isfinite(spoiled.gradients["grad_input"][7].astype(np.float32)).any()
    assert np.isfinite(spoiled.gradients["grad_weights"][7]).tolist() == [False, True]
    assert not np.isfinite(spoiled.gradients["down_lora_b"][1]).all()


# ---- what a method gives ----


@every_method
@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("rank", [0, 3])
def test_what_a_method_gives(method: Method, activation: str, rank: int) -> None:
    _, student, batch, grad_output = drawn(4, method, rank=rank, activation=activation)
    moe = student.wrapper(2)
    wrapper = WRAPPERS.get(
        method[0], "QuantizedSFTMoEWrapper" if method in QUANTIZED else "NativeSFTMoEWrapper"
    )
    group_size = find_method(method[0], "sft").resolve_group_size(method[1])
    assert (type(moe).__name__, moe.method, moe.group_size) == (wrapper, method[0], group_size)
    assert moe.expert_bytes == inference(student, 2).expert_bytes
    every = train(moe, batch, grad_output)
    shapes = {"grad_input": batch.x.shape, "grad_weights": (20, 2)}
    of_adapters = {name: matrix.shape for name, matrix in student.lora.items()}
    assert {name: value.shape for name, value in every.gradients.items()} == shapes | of_adapters
    skipping = replace(student, method=(f"{method[0]}_SkipLoRA", method[1]))
    some = train(skipping.wrapper(2), batch, grad_output)
    assert_same_steps(some, Step(every.out, {name: every.gradients[name] for name in shapes}))


@every_method
def test_gradients_are_added_to_arrays_that_are_given(method: Method) -> None:
    rng, student, batch, grad_output = drawn(5, method)
    moe = student.wrapper(2)
    fresh = train(moe, batch, grad_output)
    base = {name: rng.standard_normal(matrix.shape, np.float32) for name, matrix in student.lora.items()}
    into = SFTGradients(np.empty(0), np.empty(0), **{name: value.copy() for name, value in base.items()})
    train(moe, batch, grad_output, gradients=into, accumulate=True)
    for name, value in base.items():
        assert_same_bits(into.matrices[name], value + fresh.gradients[name], name)


# ---- laws ----


@every_method
@law
@given(
    seeds,
    sizes,
    slots,
    activations,
    st.sampled_from([1, 9, 30]),
    st.sampled_from(["rank 0", "B = 0"]),
    st.booleans(),
)
def test_without_adapters_it_is_inference(
    method: Method,
    seed: int,
    size: Any,
    num_slots: int,
    activation: Any,
    num_tokens: int,
    kind: str,
    saved: bool,
) -> None:
    rng, student, batch, _ = drawn(seed, method, size, num_tokens, num_slots, 8, activation)
    lora = {k: m if k.endswith("a") else np.zeros_like(m) for k, m in student.lora.items()}
    student = replace(student, lora={}, rank=0) if kind == "rank 0" else replace(student, lora=lora)
    mask = rng.random(student.layer.num_experts) < 0.3
    mapped = rng.integers(0, student.layer.num_experts, student.layer.num_experts)
    plain = inference(student, num_slots, mapped, gpu_experts_mask=mask)
    moe = student.wrapper(num_slots, mapped, gpu_experts_mask=mask, lora_dropout=0.5, max_cache_depth=2)
    for dtype in (np.float32, bf16):
        out = np.empty(batch.x.shape, dtype)
        expected = plain.forward(*batch, out=out.copy())
        assert_same_bits(moe.forward_sft(*batch, saved, out=out), expected)


@every_method
@law
@given(seeds, sizes, slots, ranks, activations)
def test_a_token_alone_is_as_in_the_batch(
    method: Method, seed: int, size: Any, num_slots: int, rank: int, activation: Any
) -> None:
    rng, student, batch, grad_output = drawn(seed, method, size, 40, num_slots, rank, activation)
    assert_tokens_alone_are_as_in_batch(student.wrapper(num_slots), batch, grad_output, rng)


@every_method
@law
@given(seeds, sizes, slots, ranks, st.integers(0, 30))
def test_gradients_add_over_micro_batches(
    method: Method, seed: int, size: Any, num_slots: int, rank: int, first: int
) -> None:
    _, student, batch, grad_output = drawn(seed, method, size, 30, num_slots, rank)
    moe = student.wrapper(num_slots)
    parts = [train(moe, batch.rows(rows), grad_output[rows]) for rows in (slice(first), slice(first, None))]
    assert_step_close(joined(parts), student, batch, grad_output)


@every_method
@law
@given(*THREAD_CASES)
def test_any_threads_give_the_same_bits(
    engines: list[Any], method: Method, case: Any, options: dict[str, Any]
) -> None:
    seed, *sizes = case
    _, student, batch, grad_output = drawn(seed, method, *sizes)
    assert_same_on_any_threads(engines, student, batch, grad_output, **options)


@every_method
@law
@given(seeds, sizes, slots, ranks, activations, st.sampled_from([bf16, np.float32]), st.booleans())
def test_recomputed_is_kept(
    method: Method,
    seed: int,
    size: Any,
    num_slots: int,
    rank: int,
    activation: Any,
    cache_dtype: Any,
    drops: bool,
) -> None:
    _, student, batch, grad_output = drawn(seed, method, size, 30, num_slots, rank, activation)
    options = {"cache_dtype": cache_dtype, "lora_dropout": 0.3 if drops else 0.0}
    kept, recomputed = (
        train(student.wrapper(num_slots, recompute=how, **options), batch, grad_output)
        for how in (False, True)
    )
    assert_same_steps(recomputed, kept)


@every_method
def test_an_expert_that_another_map_names_is_that_expert(method: Method) -> None:
    _, student, batch, grad_output = drawn(6, method, (4, 45, 130))
    order = np.array([2, 0, 3, 1])
    step = train(student.wrapper(2, order), batch, grad_output)
    logical = batch._replace(ids=np.where(batch.ids < 0, -1, order[batch.ids]))
    assert_same_steps(step, train(student.wrapper(2), logical, grad_output))


@pytest.mark.parametrize("method", [("AMXINT4_SFT", 32), ("MOE_INT8_SFT", None)], ids=name_of)
def test_what_was_there_before_does_not_come_back(method: Method) -> None:
    """Scratch and caches of layers of all kinds are the same memory."""
    _, student, batch, grad_output = drawn(7, method, num_tokens=40)
    moe = student.wrapper(2)
    expected = train(moe, batch, grad_output)
    for other_method in METHODS:
        _, other, poisoned, poison_grad = drawn(8, other_method, (2, 100, 150), 90, 2, 40)
        poisoned.x[...] = np.nan
        poison = other.wrapper(2, lora_dropout=0.5)
        for num in (90, 1, 17):
            train(poison, poisoned.rows(slice(num)), poison_grad[:num])
            train(moe, batch.rows(slice(num)), grad_output[:num])
            assert_same_steps(train(moe, batch, grad_output), expected)


@pytest.mark.parametrize("method", [("AMXINT8_SFT", None), ("MOE_INT8_SFT", None)], ids=name_of)
def test_scales_that_are_denormal_count_in_few_rows_and_in_many(method: Method) -> None:
    _, student, batch, grad_output = drawn(6, method, (1, 40, 70), 20, 1, rank=0)
    down = (student.layer.down_proj.astype(np.float32) * np.float32(1e-36)).astype(bf16)
    student = replace(student, layer=replace(student.layer, down_proj=down, down_bias=None))
    grad_output = (grad_output.astype(np.float32) * np.float32(1e30)).astype(bf16)
    moe = student.wrapper(1)
    whole = train(moe, batch, grad_output).gradients["grad_weights"]
    assert whole.any()
    for rows in (slice(0, 1), slice(3, 9)):
        part = train(moe, batch.rows(rows), grad_output[rows].copy())
        assert_same_bits(part.gradients["grad_weights"], whole[rows])
