"""The bound holds for every order of summation, and is sharp enough to find mistakes."""

from __future__ import annotations

import doctest
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cases import AnyArray, Layer, bf16, draw_layer

import ktmoe_np.reference.bound
from ktmoe_np.config import activation_names
from ktmoe_np.reference import activate, assert_within, error_bound, moe_forward, round_bf16


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.reference.bound).failed == 0


def sum_in_chains(products: AnyArray, chain: int) -> AnyArray:
    """Sum float32 over the last axis: `chain` numbers one after the other, then the partial sums so."""
    while products.shape[-1] > 1:
        missing = -products.shape[-1] % chain
        padded = np.pad(products, [(0, 0)] * (products.ndim - 1) + [(0, missing)])
        parts = padded.reshape(*products.shape[:-1], padded.shape[-1] // chain, chain)
        products = np.cumsum(parts, axis=-1, dtype=np.float32)[..., -1]
    return products[..., 0]


def other_engine(layer: Layer, rng: np.random.Generator, chain: int, *, round_gate: bool = False) -> AnyArray:
    """Another evaluation: every product summed in a random order and in chains, all in float32."""

    def product(a: AnyArray, w: AnyArray) -> AnyArray:
        order = rng.permutation(w.shape[1])
        products = a.astype(np.float32)[:, None, order] * w.astype(np.float32)[None, :, order]
        return sum_in_chains(products, chain)

    x = layer["hidden_states"]
    out = np.zeros(x.shape, np.float32)
    for p in range(layer["topk_ids"].shape[1]):
        for e in range(len(layer["down_proj"])):
            rows = np.flatnonzero(layer["topk_ids"][:, p] == e)
            gate, up = product(x[rows], layer["gate_proj"][e]), product(x[rows], layer["up_proj"][e])
            h = round_bf16(activate(layer["activation"], round_bf16(gate) if round_gate else gate, up))
            out[rows] += layer["topk_weights"][rows, p, None] * product(h, layer["down_proj"][e])
    return round_bf16(out).astype(bf16)


@pytest.mark.parametrize("name", activation_names())
@pytest.mark.parametrize(("H", "inter"), [(64, 32), (300, 100), (1024, 257)])
def test_float32_is_float64_within_the_bound(name: str, H: int, inter: int) -> None:
    layer = draw_layer(H, T=4, H=H, inter=inter, activation=name, biases=True)
    truth = moe_forward(**layer, accumulate_dtype=np.float64)
    assert_within(moe_forward(**layer), truth, error_bound(**layer))
    assert_within(moe_forward(**layer), truth, error_bound(**layer, sigmas=6.0))


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 33, 200]), st.sampled_from([2, 16, 1000]))
@settings(deadline=None, max_examples=20)
def test_any_order_stays_within_the_bound(seed: int, H: int, chain: int) -> None:
    layer = draw_layer(seed, H=H, inter=64)
    got = other_engine(layer, np.random.default_rng(seed), chain)
    assert_within(got, moe_forward(**layer), error_bound(**layer))
    truth = moe_forward(**layer, accumulate_dtype=np.float64)
    steps = math.ceil(math.log(max(H, 64), chain))
    assert_within(got, truth, error_bound(**layer, max_chain=steps * chain))
    assert_within(got, truth, error_bound(**layer, sigmas=6.0))


def lossy(num_terms: int) -> AnyArray:
    """A vector whose square, summed from the first term on in float32, loses every further term.

    Each of them is half an ulp of the sum, so it rounds away, which is the worst that an addition can do.
    """
    return np.array([1.0] + [2.0**-12] * (num_terms - 1)).astype(bf16)


def single_slot(**arguments: Any) -> Layer:
    """One token in one expert with weight 1."""
    ids, weights = np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32)
    return {"topk_ids": ids, "topk_weights": weights, **arguments}


def test_the_bound_is_reached_by_the_worst_sum() -> None:
    num_terms = 1000
    h = lossy(num_terms).astype(np.float32)
    layer = single_slot(
        hidden_states=np.ones((1, 1), bf16),
        gate_proj=np.sqrt(h).astype(bf16)[None, :, None],
        up_proj=None,
        down_proj=lossy(num_terms)[None, None, :],
        activation="relu2",
    )
    in_order = np.cumsum(h * h, dtype=np.float32)[-1:]
    exact = moe_forward(**layer, out_dtype=np.float64, accumulate_dtype=np.float64)
    bound = error_bound(**layer, out_dtype=np.float32)
    assert in_order == 1.0
    assert_within(in_order[None], exact, bound)
    assert np.abs(in_order - exact) > 0.45 * bound


@pytest.mark.parametrize("lossy_up", [False, True])
def test_the_bound_holds_for_the_worst_sums_before_the_activation(lossy_up: bool) -> None:
    hidden, inter = 4096, 256
    # Where silu is flat, an error of the gate cannot stand in for the error of up.
    other = -1.28125 if lossy_up else 1.0
    scale = np.linspace(1.0, 2.0, inter, endpoint=False).astype(np.float32).astype(bf16)
    worst = (scale[:, None] * lossy(hidden)[None, :]).astype(bf16)
    plain = np.where(np.arange(hidden) == 0, np.full((inter, 1), other), 0.0).astype(bf16)
    layer = single_slot(
        hidden_states=lossy(hidden)[None, :],
        gate_proj=(plain if lossy_up else worst)[None],
        up_proj=(worst if lossy_up else plain)[None],
        down_proj=np.eye(hidden, inter).astype(bf16)[None],
    )
    lost, exactly = scale.astype(np.float32), np.full(inter, other, np.float32)
    in_order = np.zeros((1, hidden), np.float32)
    gate, up = (exactly, lost) if lossy_up else (lost, exactly)
    in_order[0, :inter] = round_bf16(activate("silu", gate, up))
    exact = moe_forward(**layer, out_dtype=np.float32, accumulate_dtype=np.float64)
    assert (in_order != exact).any()
    assert_within(in_order, exact, error_bound(**layer, out_dtype=np.float32))


def test_the_bound_holds_for_the_worst_sum_of_slots() -> None:
    num_slots = 1000
    one = np.ones((1, 1, 1), bf16)
    layer = single_slot(hidden_states=one[0], gate_proj=one, up_proj=None, down_proj=one, activation="relu2")
    layer["topk_ids"] = np.zeros((1, num_slots), np.int64)
    layer["topk_weights"] = np.square(lossy(num_slots).astype(np.float32))[None]
    exact = moe_forward(**layer, out_dtype=np.float64, accumulate_dtype=np.float64)
    assert_within(np.ones((1, 1)), exact, error_bound(**layer, out_dtype=np.float32))
    assert exact > 1 + 900 * 2.0**-24


def test_the_bound_allows_the_activation_its_ulps() -> None:
    values = np.linspace(1.0, 2.0, 128, endpoint=False).astype(np.float32).astype(bf16)
    num_tokens = 128 * 128
    ids, tokens = np.divmod(np.arange(num_tokens), 128)
    layer: Layer = {
        "hidden_states": values[tokens][:, None],
        "topk_ids": ids[:, None],
        "topk_weights": np.ones((num_tokens, 1), np.float32),
        "gate_proj": values[:, None, None],
        "up_proj": None,
        "down_proj": np.ones((128, 1, 1), bf16),
        "activation": "gelu_tanh_ungated",
    }
    x = values[tokens].astype(np.float32)
    act = activate("gelu_tanh_ungated", x * values[ids].astype(np.float32))
    perturbed = round_bf16(act * np.float32(1 + 200 * 2.0**-24))[:, None]
    exact = moe_forward(**layer, out_dtype=np.float32, accumulate_dtype=np.float64)
    assert_within(perturbed, exact, error_bound(**layer, out_dtype=np.float32, activation_ulps=200.0))
    strict = error_bound(**layer, out_dtype=np.float32)
    with pytest.raises(AssertionError, match="elements are outside the bound"):
        assert_within(perturbed, exact, strict)


def test_the_bound_is_sharp_enough_to_find_mistakes() -> None:
    layer = draw_layer(7, T=16, H=512, inter=256)
    bound, truth = error_bound(**layer, sigmas=6.0), moe_forward(**layer, accumulate_dtype=np.float64)
    scale = np.sqrt(np.mean(np.square(truth.astype(np.float64))))
    assert np.median(bound / scale) < 0.02
    for mistake in (
        {**layer, "hidden_states": np.where(np.arange(512) == 511, 0, layer["hidden_states"]).astype(bf16)},
        {**layer, "topk_weights": layer["topk_weights"][:, ::-1].copy()},
        {**layer, "activation": "gelu"},
    ):
        wrong = moe_forward(**mistake)
        with pytest.raises(AssertionError, match="elements are outside the bound"):
            assert_within(wrong, truth, bound)
    twice_rounded = other_engine(layer, np.random.default_rng(0), 1000, round_gate=True)
    with pytest.raises(AssertionError, match="elements are outside the bound"):
        assert_within(twice_rounded, truth, error_bound(**layer, max_chain=40))


def test_an_overflow_stays_in_its_row_and_silent() -> None:
    layer = draw_layer(3, T=2)
    layer["topk_ids"] = np.array([[0, 1], [0, 1]])
    layer["hidden_states"][0] = 3e38
    with np.errstate(all="raise"):
        got = moe_forward(**layer).astype(np.float32)
        bound = error_bound(**layer)
    assert not np.isfinite(got[0]).any()
    assert np.isfinite(got[1]).all()
    assert np.isinf(bound[0]).all()
    assert_within(got, moe_forward(**layer, accumulate_dtype=np.float64), bound)


@pytest.mark.parametrize(
    ("actual", "expected", "bound", "message"),
    [
        ([1.0, 3.0], [1.0, 2.0], [0.0, 0.5], r"1 of 2 .* worst at \[1\]: actual .*3.0.*, expected .*2.0"),
        ([1.0, np.nan], [1.0, 2.0], [0.0, 0.5], r"1 of 2 .* worst at \[1\]: actual .*nan"),
        ([1.0, 2.0], [1.0, np.nan], [0.0, np.nan], r"1 of 2 .* worst at \[1\]"),
        ([1.0, np.inf], [1.0, 2.0], [0.0, 5.0], r"1 of 2 .* worst at \[1\]"),
        ([1.0], [1.0, 2.0], [0.0, 0.5], r"shapes differ: actual \(1,\), expected \(2,\), bound \(2,\)"),
    ],
)
def test_assert_within_fails(actual: Any, expected: Any, bound: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_within(np.array(actual), np.array(expected), np.array(bound))


def test_assert_within_passes() -> None:
    actual, expected = np.array([np.nan, np.inf, 5.0, 1.0]), np.array([np.nan, np.inf, np.nan, 1.25])
    assert_within(actual, expected, np.array([np.nan, 0.0, np.inf, 0.25]))
    assert_within(np.zeros((0, 3), bf16), np.zeros((0, 3)), np.zeros((0, 3)))
