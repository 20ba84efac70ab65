"""Where a partial sum may leave float32, in whatever order, the bounds promise nothing; elsewhere they hold.

Two evaluations that keep the specification may then differ by everything: one overflows, the other cancels
first. So wherever one of them is finite and the other is not, the bound must be infinite.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gradient_bound import gradient_balls
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layers import AnyArray, Batch, Layer, assert_close, bf16, draw_batch, draw_layer, num_examples
from quantized_cases import METHODS, quantized
from reference_cases import draw_layer as draw_arguments
from sft_layers import assert_step_close, draw_student, draw_training, train
from training_cases import draw_training as draw_arguments_of_training
from training_cases import present

from ktmoe_np.reference import assert_within, error_bound, moe_backward, moe_forward, moe_forward_sft

pytestmark = pytest.mark.kernels

quick = settings(deadline=None, max_examples=num_examples(60))
SEEDS = st.integers(0, 2**32 - 1)

#: Powers of two that the intermediate, the products with down and the weighted sums come to, about.
SIZES = st.tuples(st.integers(0, 128), st.integers(0, 130), st.integers(100, 130))


def scaled(array: AnyArray, exponent: int) -> AnyArray:
    """The array times a power of two, which may take its numbers out of range, in its own dtype."""
    with np.errstate(over="ignore"):
        return (array.astype(np.float64) * 2.0**exponent).astype(array.dtype)


def single(weights: tuple[float, ...], x: float, down: float, activation: str = "relu2") -> Any:
    """The arguments of one token in one expert of one number, taken as often as there are weights."""
    return {
        "hidden_states": np.array([[x]], bf16),
        "topk_ids": np.zeros((1, len(weights)), np.int64),
        "topk_weights": np.array([weights], np.float32),
        "gate_proj": np.ones((1, 1, 1), bf16),
        "up_proj": None,
        "down_proj": np.array([[[down]]], bf16),
        "activation": activation,
    }


def enlarged(matrices: Any, batch: Batch, sizes: tuple[int, int, int], squared: bool) -> Any:
    """Gate, up and down, and a batch, of which numbers are about as large as `sizes` say."""
    first, second, third = sizes
    gate, up, down = matrices
    num_factors = 2 if squared else 1
    half = first // num_factors // 2
    gate = scaled(gate, first // num_factors - half)
    up = None if up is None else scaled(up, -half)
    down = scaled(down, second - first)
    return (gate, up, down), Batch(scaled(batch.x, half), batch.ids, scaled(batch.weights, third - second))


# ---- products of a layer ----


@pytest.mark.parametrize(
    "arguments",
    [
        single((2.0, -2.0), 2.0**32, 2.0**63),  # y is 2^127, its double overflows, their sum is 0
        single((3.3e38, -3.3e38), 2.0, 0.5),
        single((3.3e38, 3.3e38, -3.3e38), 1.0, 1.0),
        {**single((1.0,), 3.38e38, 1.0, "silu_ungated"), "gate_bias": np.array([[2e36]], np.float32)},
        # The line before: finite in float32, infinite in bfloat16.
        {**single((1.0, -1.0), 1.0, 1.0), "down_bias": np.array([[3.4e38]], np.float32)},
        {**single((-1.0,), 1.0, 3e38), "base": np.array([[3e38]], np.float32)},
    ],
)
@pytest.mark.parametrize("out", [np.float32, bf16])
def test_an_overflow_before_the_last_sum(arguments: Any, out: Any) -> None:
    assert np.isposinf(error_bound(**arguments, out_dtype=out)).all()
    for options in ({"sigmas": 6.0}, {"max_chain": 1}):
        assert np.isposinf(error_bound(**arguments, out_dtype=out, **options)).all()


CLAMPED = ("swigluoai", "situ", "swiglustep", {"kind": "silu", "swiglu_limit": 10.0})


@pytest.mark.parametrize("activation", [*CLAMPED, "silu"])
def test_an_overflow_that_a_clamp_hides(activation: Any) -> None:
    """Partial sums of up may be infinite of either sign, so up may be NaN, which no clamp takes away."""
    x = np.full((1, 2), 2.0**64, bf16)
    gate, up = np.full((1, 1, 2), 2.0**-64, bf16), np.array([[[2.0**64, -(2.0**64)]]], bf16)
    routing = np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32)
    down = np.ones((1, 2, 1), bf16)
    assert np.isposinf(error_bound(x, *routing, gate, up, down, activation=activation)).all()


@pytest.mark.parametrize(
    "arguments",
    [
        single((1.0, -1.0), 2.0**32, 2.0**62),
        single((1.6e38, -1.6e38), 1.0, 1.0),
        single((1.0,), 1.8e19, 1.0),
        {**single((-1.0,), 1.0, 1.6e38), "base": np.array([[1.6e38]], np.float32)},
    ],
)
def test_large_numbers_that_cannot_overflow(arguments: Any) -> None:
    bound = error_bound(**arguments, out_dtype=np.float32)
    got = moe_forward(**arguments, out_dtype=np.float32)
    assert np.isfinite(bound).all()
    assert_within(got, moe_forward(**arguments, out_dtype=np.float64, accumulate_dtype=np.float64), bound)


@given(SEEDS, SIZES, st.sampled_from(["silu", "relu2", "gelu", *CLAMPED[:3]]), st.sampled_from([1, 3, 40]))
@example(0, (64, 127, 128), "relu2", 1)
@quick
def test_layers_of_large_numbers(seed: int, sizes: tuple[int, int, int], activation: str, K: int) -> None:
    rng = np.random.default_rng(seed)
    layer = draw_layer(rng, 2, K, K, activation)
    batch = draw_batch(rng, layer, 3, 2)
    (gate, up, down), batch = enlarged(layer.matrices, batch, sizes, activation == "relu2")
    layer = Layer(gate, up, down, activation=activation)
    options = {**layer.biases, "activation": activation}
    with np.errstate(over="ignore", invalid="ignore"):
        for out in (np.float32, bf16):
            assert_close(moe_forward(*batch, *layer.matrices, **options, out_dtype=out), layer, batch)
            assert_close(layer.forward(batch, out=np.empty(batch.x.shape, out)), layer, batch)


@given(SEEDS, st.sampled_from(sorted(METHODS)), st.tuples(*[st.integers(-100, 127)] * 4))
@quick
def test_quantized_layers_of_large_numbers(seed: int, method: str, exponents: tuple[int, ...]) -> None:
    layer = draw_arguments(seed, T=3, H=33, inter=17)
    for name, exponent in zip(("gate_proj", "up_proj", "down_proj"), exponents[:3], strict=True):
        # Of full range, but finite, or they would not be quantized.
        layer[name] = np.clip(layer[name].astype(np.float64) * 2.0**exponent, -3e38, 3e38).astype(bf16)
    layer["topk_weights"] = scaled(layer["topk_weights"], exponents[3])
    layer = quantized(layer, method)
    for out in (np.float32, bf16):
        got = moe_forward(**layer, out_dtype=out)
        truth = moe_forward(**layer, out_dtype=out, accumulate_dtype=np.float64)
        assert_within(got, truth, error_bound(**layer, out_dtype=out))
        assert_within(got, truth, error_bound(**layer, out_dtype=out, sigmas=6.0))


# ---- training ----


@given(SEEDS, SIZES, st.integers(-60, 127), st.sampled_from(["silu", "relu2", "swigluoai"]))
@quick
def test_gradients_of_large_numbers(
    seed: int, sizes: tuple[int, int, int], of_output: int, activation: str
) -> None:
    layer, grad_output = draw_arguments_of_training(seed, T=3, E=2, H=9, inter=7, activation=activation)
    batch = Batch(*(layer[name] for name in ("hidden_states", "topk_ids", "topk_weights")))
    matrices = tuple(layer[name] for name in ("gate_proj", "up_proj", "down_proj"))
    matrices, batch = enlarged(matrices, batch, sizes, activation == "relu2")
    layer |= dict(zip(("gate_proj", "up_proj", "down_proj"), matrices, strict=True))
    layer |= dict(zip(("hidden_states", "topk_ids", "topk_weights"), batch, strict=True))
    with np.errstate(all="ignore"):
        grad_output = scaled(grad_output, of_output)
        balls = gradient_balls(layer, grad_output, rounded=True)
        for accumulate in (np.float32, np.float64):
            out, cache = moe_forward_sft(**layer, accumulate_dtype=accumulate)
            gradients = present(moe_backward(cache, grad_output, full_weight_grad=True))
            for name, value in {**gradients, "out": out}.items():
                assert_within(value, balls[name].center, balls[name].radius)


@given(SEEDS, SIZES, st.integers(-60, 127), st.sampled_from(["silu", "relu2", "swigluoai"]))
@quick
def test_training_with_large_numbers(
    seed: int, sizes: tuple[int, int, int], of_output: int, activation: str
) -> None:
    rng = np.random.default_rng(seed)
    student = draw_student(rng, (2, 9, 17), 3, activation)
    batch, grad_output = draw_training(rng, student, 3, 2)
    (gate, up, down), batch = enlarged(student.layer.matrices, batch, sizes, activation == "relu2")
    student = replace(student, layer=Layer(gate, up, down, activation=activation))
    with np.errstate(all="ignore"):
        grad_output = scaled(grad_output, of_output)
        step = train(student.wrapper(2, full_weight_grad=True), batch, grad_output)
        assert_step_close(step, student, batch, grad_output)


def test_an_overflow_of_one_token_leaves_the_bounds_of_others() -> None:
    student, grad_output = case_of_one_large_token()
    balls = gradient_balls(student, grad_output, rounded=True)
    for name in ("out", "grad_input", "grad_weights"):
        assert np.isposinf(balls[name].radius[0]).all()
        assert np.isfinite(balls[name].radius[1:]).all()
        assert np.isfinite(balls[name].center[1:]).all()


def case_of_one_large_token() -> tuple[Any, AnyArray]:
    layer, grad_output = draw_arguments_of_training(3, T=3, E=1)
    layer["topk_ids"] = np.zeros((3, 2), np.int64)
    layer["hidden_states"][0] = 3e38
    return layer, grad_output
