"""Is training right on products that take int8 activations? The reference, and laws to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf_blocks import GGUF_BLOCKS
from gradient_bound import gradient_balls
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from int8_layers import METHODS, PLAIN_TYPES, Int8Layer, draw_int8_layer
from layers import ACTIVATIONS, Batch, assert_same_bits, bf16, num_examples
from sft_layers import (
    THREAD_CASES,
    Step,
    Student,
    assert_same_on_any_threads,
    assert_same_steps,
    assert_tokens_alone_are_as_in_batch,
    by_name,
    draw_training,
    train,
)

from ktmoe_np.reference import assert_within

pytestmark = pytest.mark.kernels

AnyArray = Any

SIZES = (1, 2, 16, 17, 33, 64, 70, 96, 129, 260)
TOKENS = (0, 1, 2, 15, 16, 17, 33)
every_method = pytest.mark.parametrize(
    "method", METHODS, ids=lambda m: ", ".join(str(part) for part in m if part is not None)
)
law = settings(deadline=None, max_examples=num_examples(8))


def drawn(
    seed: int,
    method: Any,
    sizes: tuple[int, int, int] = (3, 45, 260),
    num_tokens: int = 20,
    num_slots: int = 2,
    rank: int = 8,
    activation: Any = "silu",
    **options: Any,
) -> tuple[Int8Layer, Student, Batch, AnyArray]:
    rng = np.random.default_rng(seed)
    with_biases = bool(rng.integers(2))
    layer = draw_int8_layer(rng, method, sizes, activation, with_biases=with_biases, **options)
    student = layer.student(rng, rank)
    return layer, student, *draw_training(rng, student, num_tokens, num_slots)


def assert_step_close(
    step: Step,
    layer: Int8Layer,
    student: Student,
    batch: Batch,
    grad_output: AnyArray,
    *,
    float32_cache: bool,
) -> None:
    """The step is what the reference says of int8 activations."""
    gate, up, down = layer.integers.matrices
    own = {"gate_proj": gate, "up_proj": up, "down_proj": down, "activation_dtype": "int8"}
    balls = gradient_balls(
        {**student.reference(batch), **own}, grad_output, rounded=True, float32_cache=float32_cache
    )
    for name, value in {"float32 out": step.out, **step.gradients}.items():
        try:
            assert_within(value, balls[name].center, balls[name].radius)
        except AssertionError as error:
            error.add_note(name)
            raise


def forward(moe: Any, batch: Batch, save: bool, **options: Any) -> AnyArray:
    """The output in float32, before its last rounding."""
    result: AnyArray = moe.forward_sft(*batch, save, out=np.empty(batch.x.shape, np.float32), **options)
    return result


def step_of(moe: Any, batch: Batch, grad_output: AnyArray, **options: Any) -> Step:
    """A step whose forward pass has options of its own."""
    out = forward(moe, batch, True, **options)
    return Step(out, by_name(moe.backward(grad_output)))


# ---- against the reference ----


@settings(deadline=None, max_examples=num_examples(200))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_drawn_layers(data: st.DataObject, seed: int) -> None:
    method = data.draw(st.sampled_from(METHODS), "method")
    sizes = data.draw(st.integers(1, 3), "E"), *(data.draw(st.sampled_from(SIZES), name) for name in "IH")
    types = ("q8_0",) * 3
    if method[0] == "LLAMAFILE":
        one_type = st.sampled_from([*GGUF_BLOCKS, *PLAIN_TYPES])
        types = data.draw(st.tuples(one_type, one_type, one_type), "types")
        assume(types[0] in GGUF_BLOCKS or types[2] in GGUF_BLOCKS)
    layer, student, batch, grad_output = drawn(
        seed,
        method,
        sizes,
        data.draw(st.sampled_from(TOKENS), "T"),
        data.draw(st.integers(1, 3), "P"),
        data.draw(st.sampled_from([0, 1, 3, 16]), "R"),
        data.draw(st.sampled_from(ACTIVATIONS), "activation"),
        types=types,
    )
    cache_dtype = data.draw(st.sampled_from([bf16, np.dtype(np.float32)]), "cache")
    recompute = data.draw(st.booleans(), "recompute")
    moe = student.wrapper(
        batch.ids.shape[1], activation_dtype="int8", cache_dtype=cache_dtype, recompute=recompute
    )
    is_float32 = cache_dtype == np.float32
    step = train(moe, batch, grad_output)
    assert_step_close(step, layer, student, batch, grad_output, float32_cache=is_float32)


# ---- laws ----


@every_method
@pytest.mark.parametrize("num_tokens", [1, 9, 40])
@pytest.mark.parametrize("rank", [0, 8])
def test_without_adapters_it_is_inference(method: Any, num_tokens: int, rank: int) -> None:
    layer, student, batch, _ = drawn(1, method, num_tokens=num_tokens, rank=rank)
    for name, matrix in student.lora.items():
        if name.endswith("_b"):
            matrix[...] = 0
    made, called = student.wrapper(2, activation_dtype="int8"), student.wrapper(2)
    plain = layer.wrapper(2, activation_dtype="int8")
    expected = plain.forward(*batch, out=np.empty(batch.x.shape, np.float32))
    for save in (False, True):
        assert_same_bits(forward(made, batch, save), expected)
        assert_same_bits(forward(called, batch, save, activation_dtype="int8"), expected)
    assert_same_bits(called.forward(*batch, activation_dtype="int8"), plain.forward(*batch))
    assert_same_bits(forward(made, batch, False, activation_dtype="bfloat16"), forward(called, batch, False))


@every_method
@pytest.mark.parametrize("recompute", [False, True])
def test_a_call_that_asks_is_a_layer_that_was_made_so(method: Any, recompute: bool) -> None:
    _, student, batch, grad_output = drawn(2, method)
    options = {"recompute": recompute, "lora_dropout": 0.3, "max_cache_depth": 2}
    made = {
        dtype: student.wrapper(2, activation_dtype=dtype, **options) for dtype in (None, "bfloat16", "int8")
    }
    expected = {
        dtype: train(student.wrapper(2, activation_dtype=dtype, lora_dropout=0.3), batch, grad_output)
        for dtype in ("bfloat16", "int8")
    }
    assert not np.array_equal(expected["int8"].out, expected["bfloat16"].out)
    for moe in made.values():
        for dtype, want in expected.items():
            moe.step = 0
            assert_same_steps(step_of(moe, batch, grad_output, activation_dtype=dtype), want)
        # Two passes wait: each goes back through its own activations.
        moe.step = 0
        first = forward(moe, batch, True, activation_dtype="int8")
        moe.step = 0
        second = forward(moe, batch, True, activation_dtype="bfloat16")
        later, earlier = (by_name(moe.backward(grad_output)) for _ in range(2))
        assert_same_steps(Step(second, later), expected["bfloat16"])
        assert_same_steps(Step(first, earlier), expected["int8"])


@every_method
def test_submitted_is_as_called(method: Any) -> None:
    _, student, batch, grad_output = drawn(3, method)
    moe = student.wrapper(2)
    expected = step_of(moe, batch, grad_output, activation_dtype="int8")
    out = np.empty(batch.x.shape, np.float32)
    moe.submit_forward_sft(*batch, out=out, activation_dtype="int8")
    moe.sync_forward_sft()
    moe.submit_backward(grad_output)
    assert_same_steps(Step(out, by_name(moe.sync_backward())), expected)


@every_method
def test_a_token_alone_is_as_in_the_batch(method: Any) -> None:
    _, student, batch, grad_output = drawn(4, method, num_tokens=40)
    moe = student.wrapper(2, activation_dtype="int8")
    assert_tokens_alone_are_as_in_batch(moe, batch, grad_output, np.random.default_rng(0))


@every_method
@law
@given(*THREAD_CASES)
def test_any_threads_give_the_same_bits(
    engines: list[Any], method: Any, case: Any, options: dict[str, Any]
) -> None:
    seed, *sizes = case
    _, student, batch, grad_output = drawn(seed, method, *sizes)
    options = {**options, "activation_dtype": "int8"}
    assert_same_on_any_threads(engines, student, batch, grad_output, **options)


# ---- gradients ----


@pytest.mark.parametrize("types", [("f16", "f32", "q4_k"), ("bf16", "bf16", "q8_0"), ("f32", "f16", "tq1_0")])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_gradients_are_those_of_bfloat16_where_saved_activations_are(types: Any, activation: Any) -> None:
    """With int8 activations in down alone both passes save the same, and no gradient has another formula."""
    _, student, batch, grad_output = drawn(5, ("LLAMAFILE", None), types=types, activation=activation)
    moe = student.wrapper(2)
    in_int8 = step_of(moe, batch, grad_output, activation_dtype="int8")
    in_bf16 = step_of(moe, batch, grad_output, activation_dtype="bfloat16")
    assert not np.array_equal(in_int8.out, in_bf16.out)
    assert_same_steps(Step(in_bf16.out, in_int8.gradients), in_bf16)


@every_method
def test_gradients_are_finite_and_near_those_of_bfloat16(method: Any) -> None:
    _, student, batch, grad_output = drawn(6, method, num_tokens=30)
    moe = student.wrapper(2)
    in_int8 = step_of(moe, batch, grad_output, activation_dtype="int8").gradients
    in_bf16 = step_of(moe, batch, grad_output, activation_dtype="bfloat16").gradients
    for name, value in in_int8.items():
        got, want = value.astype(np.float64), in_bf16[name].astype(np.float64)
        assert np.isfinite(got).all(), name
        assert 0 < np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want), name


def test_a_refused_pass_is_not_saved() -> None:
    _, student, batch, grad_output = drawn(7, ("LLAMAFILE", None), types=("f16", "f16", "f16"))
    moe = student.wrapper(2)
    expected = train(moe, batch, grad_output)
    before = moe.step
    message = "^activation_dtype: got int8, expected bfloat16: f16 weights are not integers with scales$"
    for call in (moe.forward, moe.forward_sft, moe.submit_forward_sft):
        with pytest.raises(ValueError, match=message):
            call(*batch, activation_dtype="int8")
        assert (moe.num_cached, moe.step) == (0, before)
    assert_same_steps(train(moe, batch, grad_output), expected)
    with pytest.raises(ValueError, match=message):
        student.wrapper(2, activation_dtype="int8")
