"""The gradients of the reference: differences, autograd, the bound of their errors, their laws."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from gradient_bound import gradient_balls
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import ACTIVATIONS
from reference_cases import FORMULAS, AnyArray, Layer, bf16, bits
from training_cases import ARGUMENTS, LORA_NAMES, draw_training, present, train

from ktmoe_np.reference import Dropout, assert_within, moe_backward, moe_forward_sft

quick = settings(deadline=None, max_examples=50)
SMALL = {"T": 4, "E": 3, "P": 3, "H": 7, "inter": 6, "R": 2}


def exact_loss(layer: Layer, grad_output: AnyArray) -> float:
    out, _ = moe_forward_sft(**layer, exact=True)
    return float((out * grad_output.astype(np.float64)).sum())


def moved(layer: Layer, argument: str, direction: AnyArray) -> Layer:
    """The layer with `direction` added to one of its arrays, in float64."""
    if argument in LORA_NAMES:
        matrix = getattr(layer["lora"], argument).astype(np.float64) + direction
        return {**layer, "lora": replace(layer["lora"], **{argument: matrix})}
    return {**layer, argument: np.asarray(layer[argument]).astype(np.float64) + direction}


def variant(name: str, activation: Any) -> tuple[Layer, AnyArray]:
    layer, grad_output = draw_training(8, **SMALL, activation=activation, biases=name != "plain")
    if name == "dropout":
        layer["dropout"] = Dropout(0.4, seed=5)
    if name == "placed":
        layer["physical_to_logical_map"] = np.array([2, 0, 2])
        layer["gpu_experts_mask"] = np.array([False, True, False])
    layer["scale_inputs"] = name in ("scaled", "scaled with dropout")
    if name == "scaled with dropout":
        layer["dropout"] = Dropout(0.3, seed=6)
    if name == "no lora":
        layer["lora"] = None
    return layer, grad_output


@pytest.mark.parametrize("activation", sorted(FORMULAS))
@pytest.mark.parametrize(
    "name", ["plain", "biases", "dropout", "placed", "no lora", "scaled", "scaled with dropout"]
)
def test_gradients_are_differences(name: str, activation: str) -> None:
    layer, grad_output = variant(name, FORMULAS[activation][0])
    gradients = present(train(layer, grad_output, exact=True))
    assert (
        len(gradients)
        == 2 + (3 if layer["lora"] is None else 9) * (3 if layer["up_proj"] is not None else 2) // 3
    )
    rng, step = np.random.default_rng(0), 1e-5
    for gradient_name, gradient in gradients.items():
        argument = ARGUMENTS.get(gradient_name, gradient_name)
        assert gradient.dtype == np.float64
        for _ in range(3):
            direction = rng.standard_normal(gradient.shape)
            ahead, behind = (
                exact_loss(moved(layer, argument, sign * step * direction), grad_output) for sign in (1, -1)
            )
            slope = float((gradient * direction).sum())
            scale = float(np.abs(gradient * direction).sum())
            assert abs((ahead - behind) / (2 * step) - slope) <= 1e-7 * (1 + scale), gradient_name


def test_each_element_is_a_difference() -> None:
    layer, grad_output = variant("dropout", "silu")
    gradients = present(train(layer, grad_output, exact=True))
    step = 1e-5
    for gradient_name, gradient in gradients.items():
        argument = ARGUMENTS.get(gradient_name, gradient_name)
        for at in np.ndindex(gradient.shape):
            direction = np.zeros(gradient.shape)
            direction[at] = step
            ahead, behind = (
                exact_loss(moved(layer, argument, sign * direction), grad_output) for sign in (1, -1)
            )
            assert abs((ahead - behind) / (2 * step) - gradient[at]) < 1e-7 * (1 + abs(gradient[at]))


def autograd(layer: Layer, grad_output: AnyArray) -> dict[str, AnyArray]:
    """The gradients by torch in float64, without roundings, one slot at a time."""
    torch = pytest.importorskip("torch")
    lora, spec = layer["lora"], layer["activation"]
    arrays = {k: layer[k] for k in ARGUMENTS.values()} | {k: getattr(lora, k) for k in LORA_NAMES}
    leaves = {
        name: torch.tensor(value.astype(np.float64), requires_grad=True)
        for name, value in arrays.items()
        if value is not None
    }
    bias = {k: torch.tensor(v.astype(np.float64)) for k, v in layer.items() if k.endswith("_bias")}
    rate = layer["dropout"].rate if layer.get("dropout") else 0.0
    s = float(np.float32(lora.lora_alpha / lora.gate_lora_a.shape[1] / (1 - rate)))
    num_tokens, hidden = layer["hidden_states"].shape
    inter = layer["gate_proj"].shape[1]
    dropout = layer.get("dropout") or Dropout(0.0)
    kept = {
        n: torch.tensor(dropout.mask(num_tokens, k, n).astype(float))
        for n, k in (("x", hidden), ("h", inter))
    }

    def project(name: str, e: int, operand: Any, mask: Any) -> Any:
        low = leaves[f"{name}_lora_b"][e] @ (leaves[f"{name}_lora_a"][e] @ (operand * mask))
        result = leaves[f"{name}_proj"][e] @ operand + s * low
        return result + bias[f"{name}_bias"][e] if f"{name}_bias" in bias else result

    functional = torch.nn.functional
    functions = {
        "silu": lambda g, u: functional.silu(g) * u,
        "swigluoai": lambda g, u: (
            g.clamp(max=7) * torch.sigmoid(float(np.float32(1.702)) * g.clamp(max=7)) * (u.clamp(-7, 7) + 1)
        ),
        "gelu": lambda g, u: functional.gelu(g) * u,
        "gelu_tanh": lambda g, u: functional.gelu(g, approximate="tanh") * u,
        "situ": lambda g, u: 4 * torch.tanh(g / 4) * torch.sigmoid(g) * 25 * torch.tanh(u / 25),
        "relu2": lambda g, u: functional.relu(g) ** 2,
        "silu_ungated": lambda g, u: functional.silu(g),
    }
    loss: Any = 0.0
    for (t, p), e in np.ndenumerate(layer["topk_ids"]):
        if e >= 0:
            x = leaves["hidden_states"][t]
            g = project("gate", e, x, kept["x"][t])
            u = project("up", e, x, kept["x"][t]) if "up_proj" in leaves else None
            y = project("down", e, functions[spec](g, u), kept["h"][t])
            loss = loss + leaves["topk_weights"][t, p] * (y @ torch.tensor(grad_output[t].astype(np.float64)))
    loss.backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}


@pytest.mark.crosscheck
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(
    "activation", ["silu", "swigluoai", "gelu", "gelu_tanh", "situ", "relu2", "silu_ungated"]
)
def test_gradients_are_those_of_torch(activation: str, rate: float) -> None:
    sizes = {"T": 6, "E": 3, "P": 2, "H": 24, "inter": 16, "R": 4}
    layer, grad_output = draw_training(2, **sizes, activation=activation, biases=True)
    layer["dropout"] = Dropout(rate, seed=3) if rate else None
    truth = autograd(layer, grad_output)
    exact, rounded = (present(train(layer, grad_output, **numbers)) for numbers in ({"exact": True}, {}))
    balls = gradient_balls(layer, grad_output, rounded=False)
    assert {ARGUMENTS.get(name, name) for name in exact} == truth.keys()
    for name in exact:
        expected = truth[ARGUMENTS.get(name, name)]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(exact[name], expected, rtol=1e-12, atol=1e-12 * scale, err_msg=name)
        np.testing.assert_allclose(balls[name].center, expected, rtol=1e-12, atol=1e-12 * scale)
        assert_within(rounded[name], expected, balls[name].radius + 1e-12 * scale)
        # A bound that finds mistakes: below a tenth of what it bounds.
        assert np.median(balls[name].radius) < 0.1 * np.sqrt(np.mean(np.square(expected)))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_float32_is_float64_within_the_bound(activation: Any, rate: float) -> None:
    layer, grad_output = draw_training(4, T=9, H=40, inter=24, activation=activation, biases=True)
    layer["dropout"] = Dropout(rate, seed=3) if rate else None
    balls = gradient_balls(layer, grad_output, rounded=True)
    for accumulate in (np.float32, np.float64):
        out, cache = moe_forward_sft(**layer, accumulate_dtype=accumulate)
        gradients = present(moe_backward(cache, grad_output, full_weight_grad=True))
        for name, value in {**gradients, "out": out}.items():
            assert_within(value, balls[name].center, balls[name].radius)


def test_the_bound_finds_a_missing_rounding() -> None:
    layer, grad_output = draw_training(4, T=9, H=40, inter=24)
    balls = gradient_balls(layer, grad_output, rounded=True)
    unrounded_cache = present(train(layer, grad_output, cache_dtype=np.float32))
    for name in ("gate_lora_b", "up_lora_a", "gate_proj"):
        with pytest.raises(AssertionError, match="elements are outside the bound"):
            assert_within(unrounded_cache[name], balls[name].center, balls[name].radius)


@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(0, 6))
@quick
def test_gradients_add_over_micro_batches(seed: int, first: int, second: int) -> None:
    layer, grad_output = draw_training(seed, **{**SMALL, "T": first + second})
    whole = present(train(layer, grad_output, exact=True))
    parts = []
    for tokens in (slice(0, first), slice(first, None)):
        per_token = {k: layer[k][tokens] for k in ("hidden_states", "topk_ids", "topk_weights")}
        parts.append(present(train({**layer, **per_token}, grad_output[tokens], exact=True)))
    for name, value in whole.items():
        join = np.concatenate if name in ("grad_input", "grad_weights") else sum
        np.testing.assert_allclose(join([part[name] for part in parts]), value, rtol=1e-12, atol=1e-11)


@given(st.integers(0, 2**32 - 1), st.floats(-3, 3), st.integers(-3, 3))
@quick
def test_gradients_are_linear_in_the_gradient_of_the_output(seed: int, factor: float, power: int) -> None:
    layer, one = draw_training(seed, **SMALL)
    other = draw_training(seed + 9, **SMALL)[1]
    mixed = one.astype(np.float64) + factor * other.astype(np.float64)
    _, cache = moe_forward_sft(**layer, exact=True)
    a, b, both = (present(moe_backward(cache, q, full_weight_grad=True)) for q in (one, other, mixed))
    for name, value in both.items():
        np.testing.assert_allclose(a[name] + factor * b[name], value, rtol=1e-11, atol=1e-10)
    # A power of two passes through every rounding.
    _, cache = moe_forward_sft(**layer)
    once, scaled = (present(moe_backward(cache, (one * bf16(f)).astype(bf16))) for f in (1, 2.0**power))
    for name, value in scaled.items():
        np.testing.assert_array_equal(once[name].astype("f4") * np.float32(2.0**power), value.astype("f4"))


@given(st.integers(0, 2**32 - 1))
@quick
def test_permuting_tokens_permutes(seed: int) -> None:
    layer, grad_output = draw_training(seed, **SMALL)
    order = np.random.default_rng(seed).permutation(4)
    per_token = {name: layer[name][order] for name in ("hidden_states", "topk_ids", "topk_weights")}
    # In float64 sums of few products of bfloat16 numbers have no errors, whatever NumPy's order.
    wide: Layer = {"accumulate_dtype": np.float64}
    plain, permuted = (
        train(layer, grad_output, **wide),
        train({**layer, **per_token}, grad_output[order], **wide),
    )
    assert np.array_equal(bits(permuted.grad_input), bits(plain.grad_input[order]))
    for field in fields(plain):
        value, expected = getattr(permuted, field.name), getattr(plain, field.name)
        if expected is not None and field.name != "grad_input":
            expected = expected[order] if field.name == "grad_weights" else expected
            np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)


def test_skipped_slots_give_nothing() -> None:
    layer, grad_output = draw_training(1, T=6)
    layer["accumulate_dtype"] = np.float64
    mask = np.array([True, False, False, True])
    hidden = (layer["topk_ids"] < 0) | mask[layer["topk_ids"]]
    masked = train({**layer, "gpu_experts_mask": mask}, grad_output)
    skipped = train({**layer, "topk_ids": np.where(hidden, -1, layer["topk_ids"])}, grad_output)
    zeroed = train({**layer, "topk_weights": np.where(hidden, 0, layer["topk_weights"])}, grad_output)
    assert hidden.any()
    assert not masked.grad_weights[hidden].any()
    assert masked.grad_weights[~hidden].all()
    assert np.array_equal(zeroed.grad_weights[~hidden], masked.grad_weights[~hidden])
    for name, value in present(masked).items():
        assert value.tobytes() == getattr(skipped, name).tobytes()
        if name != "grad_weights":
            np.testing.assert_array_equal(getattr(zeroed, name).astype("f8"), value.astype("f8"))
        if name not in ("grad_input", "grad_weights"):
            assert not value[mask].any()


def test_grad_weights_are_the_products_with_each_slots_output() -> None:
    layer, grad_output = draw_training(6, biases=True)
    gradient = train(layer, grad_output, exact=True).grad_weights
    for p in range(2):
        alone = np.zeros_like(layer["topk_weights"])
        alone[:, p] = 1
        out, _ = moe_forward_sft(**{**layer, "topk_weights": alone}, exact=True)
        np.testing.assert_allclose((out * grad_output.astype(float)).sum(axis=1), gradient[:, p], rtol=1e-12)


def test_a_map_gathers_weights_and_scatters_their_gradients() -> None:
    layer, grad_output = draw_training(1, T=6)
    mapping = np.array([3, 0, 1, 2])
    mapped = train({**layer, "physical_to_logical_map": mapping}, grad_output)
    logical = np.where(layer["topk_ids"] < 0, -1, mapping[layer["topk_ids"]])
    for name, value in present(train({**layer, "topk_ids": logical}, grad_output)).items():
        assert value.tobytes() == getattr(mapped, name).tobytes()
