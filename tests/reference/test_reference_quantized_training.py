"""The training step with quantized base weights: against a plain loop, within its bound, its laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gradient_bound import Ball, gradient_balls
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_cases import METHODS, PROJECTIONS, quantized
from reference_cases import FORMULAS, AnyArray, Layer, bf16, bits
from training_cases import draw_training, present, train
from training_loop import Loop

from ktmoe_np.reference import (
    Dropout,
    assert_within,
    dequantize,
    gradient_weights,
    moe_backward,
    moe_forward,
    moe_forward_sft,
    product_weights,
    quantize_activations,
    round_bf16,
)

quick = settings(deadline=None, max_examples=40)
methods = pytest.mark.parametrize("method", sorted(METHODS))


def draw_quantized_training(seed: int, method: str, **sizes: Any) -> tuple[Layer, AnyArray]:
    layer, grad_output = draw_training(seed, **sizes)
    return quantized(layer, method), grad_output


def with_weights(layer: Layer, function: Any) -> Layer:
    """The layer with bfloat16 or float64 weights that `function` makes of its quantized ones."""
    plain = {n: None if layer[n] is None else function(layer[n]) for n in PROJECTIONS}
    return {**layer, **plain, "product": "bfloat16"}


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(sorted(METHODS)),
    st.sampled_from(["silu", "relu2"]),
    st.tuples(*(st.integers(low, high) for low, high in ((0, 3), (1, 3), (0, 3), (1, 40), (1, 35), (1, 3)))),
    st.sampled_from([0.0, 0.3]),
    st.booleans(),
)
@quick
def test_a_step_is_the_loop(
    seed: int, method: str, activation: str, sizes: tuple[int, ...], rate: float, biases: bool
) -> None:
    named = dict(zip(("T", "E", "P", "H", "inter", "R"), sizes, strict=True))
    layer, grad_output = draw_quantized_training(seed, method, **named, activation=activation, biases=biases)
    layer["dropout"] = Dropout(rate, seed=seed) if rate else None
    loop = Loop(layer, grad_output, float32_cache=False)
    out, cache = moe_forward_sft(**layer, accumulate_dtype=np.float64, out_dtype=np.float64)
    np.testing.assert_allclose(out, loop.out, rtol=1e-12, atol=1e-12)
    gradients = present(moe_backward(cache, grad_output))
    grad_input = gradients.pop("grad_input").astype("f4")
    np.testing.assert_array_equal(grad_input, round_bf16(loop.gradients.pop("grad_input")))
    assert gradients.keys() == loop.gradients.keys()
    for name, expected in loop.gradients.items():
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-12, atol=1e-12, err_msg=name)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([0.0, 1e-4, 0.004, 0.3]))
@quick
def test_the_interval_of_codes_holds_every_row_in_it(seed: int, K: int, radius: float) -> None:
    rng = np.random.default_rng(seed)
    center = round_bf16(rng.standard_normal((5, K))).astype(np.float64)
    operand = Ball(center, radius * np.abs(center) * rng.uniform(0.1, 1.0, (5, K)))
    for rounded in (True, False):
        result = operand.int8(rounded)
        for _ in range(20):
            # Most elements near the ends of their intervals, by more than float32 rounds.
            sign = np.clip(rng.uniform(-3, 3, center.shape), -1, 1)
            row = (center + 0.99 * sign * operand.radius).astype(np.float32)
            codes, scale = quantize_activations(row)
            decoded = codes * scale[:, None].astype(np.float64)
            assert (np.abs(decoded - result.center) <= result.radius * (1 + 1e-12)).all()


@methods
@pytest.mark.parametrize("activation", ["silu", "swigluoai", "relu2"])
@pytest.mark.parametrize("rounded", [True, False])
def test_evaluations_lie_within_the_bound(method: str, activation: str, rounded: bool) -> None:
    sizes: Any = {"T": 9, "H": 40, "inter": 24, "biases": True}
    layer, grad_output = draw_quantized_training(4, method, activation=FORMULAS[activation][0], **sizes)
    layer["dropout"] = Dropout(0.3, seed=3)
    balls = gradient_balls(layer, grad_output, rounded=rounded)
    computations: list[Layer] = [
        {},
        {"accumulate_dtype": np.float64},
        *([] if rounded else [{"exact": True}]),
    ]
    for numbers in computations:
        out, cache = moe_forward_sft(**layer, **numbers)
        for name, value in {**present(moe_backward(cache, grad_output)), "out": out}.items():
            assert_within(value, balls[name].center, balls[name].radius)


@methods
def test_the_bound_finds_mistakes(method: str) -> None:
    layer, grad_output = draw_quantized_training(4, method, T=9, H=40, inter=24)
    balls = gradient_balls(layer, grad_output, rounded=True)
    unrounded_cache = present(train(layer, grad_output, full=False, cache_dtype=np.float32))
    other_weights = present(train(with_weights(layer, gradient_weights), grad_output, full=False))
    mistakes = [(unrounded_cache, "gate_lora_b")]
    if method != "weight-only int8, 32":
        mistakes.append((other_weights, "down_lora_a"))
    for mistake, name in mistakes:
        with pytest.raises(AssertionError, match="elements are outside the bound"):
            assert_within(mistake[name], balls[name].center, balls[name].radius)


@methods
@pytest.mark.parametrize("accumulate", [np.float32, np.float64])
def test_without_adapters_it_is_inference_bit_for_bit(method: str, accumulate: type) -> None:
    layer, _ = draw_quantized_training(1, method, T=6, biases=True)
    lora = layer.pop("lora")
    expected = moe_forward(**layer, accumulate_dtype=accumulate)
    no_b = {
        f"{name}_lora_b": np.zeros_like(getattr(lora, f"{name}_lora_b")) for name in ("gate", "up", "down")
    }
    for adapters in (None, replace(lora, **no_b)):
        out, _ = moe_forward_sft(**layer, lora=adapters, accumulate_dtype=accumulate)
        assert np.array_equal(bits(out), bits(expected))


@methods
def test_backward_goes_through_the_rounded_weights(method: str) -> None:
    layer, grad_output = draw_quantized_training(2, method, T=6)
    _, cache = moe_forward_sft(**layer)
    _, plain = moe_forward_sft(**with_weights(layer, gradient_weights))
    swapped = {name: getattr(plain.inputs, name) for name in ("gate", "up", "down")}
    got = present(moe_backward(cache, grad_output))
    expected = moe_backward(replace(cache, inputs=replace(cache.inputs, **swapped)), grad_output)
    for name, value in got.items():
        assert value.tobytes() == getattr(expected, name).tobytes()


def test_groups_train_as_their_decoded_weights() -> None:
    layer, grad_output = draw_quantized_training(2, "weight-only int8, 32", T=6)
    plain = with_weights(layer, product_weights)
    assert np.array_equal(bits(moe_forward_sft(**layer)[0]), bits(moe_forward_sft(**plain)[0]))
    expected = train(plain, grad_output, full=False)
    for name, value in present(train(layer, grad_output, full=False)).items():
        assert value.tobytes() == getattr(expected, name).tobytes()


@methods
def test_an_exact_computation_rounds_neither_weights_nor_activations(method: str) -> None:
    layer, grad_output = draw_quantized_training(2, method, T=6)
    plain = with_weights(layer, lambda matrix: dequantize(matrix, np.float64))
    got, expected = (moe_forward_sft(**each, exact=True)[0] for each in (layer, plain))
    assert got.tobytes() == expected.tobytes()
    gradients = train(plain, grad_output, full=False, exact=True)
    for name, value in present(train(layer, grad_output, full=False, exact=True)).items():
        assert value.tobytes() == getattr(gradients, name).tobytes()


@methods
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_makes_its_row_and_its_experts_nan(method: str, value: float) -> None:
    layer, grad_output = draw_quantized_training(3, method, T=3)
    layer["topk_ids"] = np.array([[0, 1], [2, -1], [2, 3]])
    clean = present(train(layer, grad_output, full=False))
    layer["hidden_states"][0, 7] = value
    with np.errstate(all="raise"):
        out, cache = moe_forward_sft(**layer)
        got = present(moe_backward(cache, grad_output))
    assert np.isnan(out.astype("f4")).all(axis=1).tolist() == [True, False, False]
    assert np.isnan(got["grad_input"].astype("f4")).all(axis=1).tolist() == [True, False, False]
    assert np.isnan(got["grad_weights"]).all(axis=1).tolist() == [True, False, False]
    for name in got.keys() - {"grad_input", "grad_weights"}:
        assert np.isnan(got[name][:2]).all(), name
        assert got[name][2:].tobytes() == clean[name][2:].tobytes(), name


@methods
def test_quantized_weights_have_no_gradient(method: str) -> None:
    layer, grad_output = draw_quantized_training(0, method)
    message = "full_weight_grad: got True, expected False: gate_proj is quantized"
    with pytest.raises(ValueError, match=message):
        train(layer, grad_output)
    assert train(layer, grad_output, full=False).gate_proj is None
    assert moe_backward(moe_forward_sft(**layer)[1], grad_output, skip_lora=True).grad_input.dtype == bf16
