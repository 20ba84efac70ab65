"""The reference against a plain loop, against itself in float64, its laws and its errors."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cases import FORMULAS, Layer, bf16, bits, draw_layer, loop

import ktmoe_np.reference.forward
from ktmoe_np.config import activation_names
from ktmoe_np.reference import assert_within, error_bound, moe_forward, round_bf16

quick = settings(deadline=None, max_examples=100)


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.reference.forward).failed == 0


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(sorted(FORMULAS)),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 3),
    st.tuples(st.integers(1, 9), st.integers(1, 7)),
    st.sampled_from([np.int8, np.int32, np.int64]),
    st.sets(st.sampled_from(["biases", "mask", "map", "base", "lists", "scaled"])),
)
@quick
def test_forward_is_the_loop(
    seed: int, name: str, T: int, E: int, P: int, sizes: tuple[int, int], ids: type, options: set[str]
) -> None:
    activation, formula = FORMULAS[name]
    layer = draw_layer(
        seed, T=T, E=E, P=P, H=sizes[0], inter=sizes[1], activation=activation, biases="biases" in options
    )
    rng = np.random.default_rng(seed)
    layer["topk_ids"] = layer["topk_ids"].astype(ids)
    if "mask" in options:
        layer["gpu_experts_mask"] = rng.random(E) < 0.4
    if "map" in options:
        layer["physical_to_logical_map"] = rng.integers(0, E, E)
    if "base" in options:
        layer["base"] = rng.standard_normal(layer["hidden_states"].shape).astype(np.float32)
    if "lists" in options:
        layer["down_proj"] = list(layer["down_proj"])
    if "scaled" in options:
        layer |= {"topk_weights": 3 * layer["topk_weights"] - 1, "scale_inputs": True}
    expected = loop(layer, formula)
    for out in (np.float64, np.float32, bf16):
        bound = error_bound(**layer, out_dtype=out)
        truth = round_bf16(expected) if out is bf16 else expected.astype(out)
        for accumulate in (np.float32, np.float64):
            got = moe_forward(**layer, out_dtype=out, accumulate_dtype=accumulate)
            assert got.dtype == out
            assert_within(got, truth, bound)


def exact_layer(seed: int, **sizes: Any) -> Layer:
    """Small integers: every float32 sum is exact, so laws hold bit for bit whatever NumPy's order."""
    layer = draw_layer(seed, activation="relu2", **sizes)
    for name in ("hidden_states", "gate_proj", "down_proj"):
        layer[name] = np.sign(layer[name].astype(np.float32)).astype(bf16)
    layer["topk_weights"] = np.round(layer["topk_weights"] * 4)
    return layer


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@quick
def test_laws(seed: int, T: int) -> None:
    layer = exact_layer(seed, T=T)
    rng = np.random.default_rng(seed)
    result = bits(moe_forward(**layer))
    per_token = ("hidden_states", "topk_ids", "topk_weights")
    order = rng.permutation(T)
    permuted = {**layer, **{name: layer[name][order] for name in per_token}}
    assert np.array_equal(bits(moe_forward(**permuted)), result[order])
    alone = {**layer, **{name: layer[name][:1] for name in per_token}}
    assert np.array_equal(bits(moe_forward(**alone)), result[:1])
    mask = rng.random(4) < 0.5
    zeroed = np.where(mask[layer["topk_ids"]] & (layer["topk_ids"] >= 0), 0, layer["topk_weights"])
    masked = bits(moe_forward(**layer, gpu_experts_mask=mask))
    assert np.array_equal(masked, bits(moe_forward(**{**layer, "topk_weights": zeroed.astype(np.float32)})))
    mapping = rng.permutation(4)
    renamed = {name: layer[name][mapping] for name in ("gate_proj", "down_proj")}
    mapped = bits(moe_forward(**layer, physical_to_logical_map=mapping))
    assert np.array_equal(mapped, bits(moe_forward(**{**layer, **renamed})))


@pytest.mark.parametrize("dtype", [bf16, np.float16, np.float32, np.float64])
def test_a_base_is_added_before_the_one_rounding(dtype: type) -> None:
    layer = exact_layer(1)
    base = np.random.default_rng(1).standard_normal(layer["hidden_states"].shape).astype(dtype)
    before = base.copy()
    total = moe_forward(**layer, out_dtype=np.float32) + base.astype(np.float32)
    assert np.array_equal(bits(moe_forward(**layer, base=base)), bits(total.astype(bf16)))
    assert np.array_equal(base, before)


@pytest.mark.parametrize("activation", activation_names())
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("zero_weights", [False, True])
def test_what_is_not_finite_makes_its_own_row_nan(activation: str, value: float, zero_weights: bool) -> None:
    layer = draw_layer(3, T=4, activation=activation)
    layer["topk_ids"] = np.array([[0, 1], [2, -1], [-1, -1], [3, 3]])
    if zero_weights:
        layer["gate_proj"] = np.zeros_like(layer["gate_proj"])
    clean = moe_forward(**layer)
    for t in range(4):
        layer["hidden_states"] = draw_layer(3, T=4, activation=activation)["hidden_states"]
        layer["hidden_states"][t, 7] = value
        got = moe_forward(**layer)
        others = np.arange(4) != t
        assert np.array_equal(bits(got[others]), bits(clean[others]))
        assert np.isnan(got[t].astype(np.float32)).all() == (t != 2)
        assert np.array_equal(np.isnan(error_bound(**layer)), np.isnan(got.astype(np.float32)))
    assert not moe_forward(**layer)[2].any()


def test_a_nan_routing_weight_makes_its_row_nan_when_its_slot_is_computed() -> None:
    layer = draw_layer(3, T=3)
    layer["topk_ids"] = np.array([[0, 1], [-1, 1], [0, 1]])
    layer["topk_weights"][:2, 0] = np.nan
    got = np.isnan(moe_forward(**layer).astype(np.float32))
    assert got.all(axis=1).tolist() == [True, False, False]
    assert got.any(axis=1).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": [[1.0]]}, TypeError, "hidden_states must be a NumPy array, got list"),
        ({"hidden_states": np.zeros((5, 48))}, TypeError, "hidden_states must be bfloat16, got float64"),
        (
            {"hidden_states": np.zeros(48, bf16)},
            ValueError,
            r"hidden_states must have shape \[T, H\], got \[48\]",
        ),
        (
            {"hidden_states": np.zeros((5, 47), bf16)},
            ValueError,
            r"gate_proj\[0\] must have shape \[I, H=47\]",
        ),
        ({"topk_ids": np.zeros((5, 2))}, TypeError, "topk_ids must have an integer dtype, got float64"),
        ({"topk_ids": np.zeros((5, 2), bool)}, TypeError, "topk_ids must have an integer dtype, got bool"),
        (
            {"topk_ids": np.zeros((4, 2), int)},
            ValueError,
            r"topk_ids must have shape \[T=5, P\], got \[4, 2\]",
        ),
        (
            {"topk_weights": np.zeros((5, 3), np.float32)},
            ValueError,
            r"topk_weights must have shape \[T=5, P=2\], got \[5, 3\]",
        ),
        ({"topk_weights": np.zeros((5, 2))}, TypeError, "topk_weights must be float32, got float64"),
        ({"gate_proj": np.zeros((40, 48), bf16)}, ValueError, r"gate_proj must have shape \[E, I, H\], got"),
        ({"gate_proj": []}, ValueError, "gate_proj must hold some experts, got 0"),
        ({"gate_proj": 3}, TypeError, "gate_proj must be an array or a sequence of arrays, got int"),
        ({"up_proj": np.zeros((3, 40, 48), bf16)}, ValueError, "up_proj must hold 4 experts, got 3"),
        ({"up_proj": np.zeros((4, 40, 48), "f4")}, TypeError, r"up_proj\[0\] must be bfloat16, got float32"),
        ({"up_proj": None}, ValueError, "up_proj is None, but activation silu is gated"),
        ({"activation": "relu2"}, ValueError, "up_proj must be None: activation relu2 has one projection"),
        (
            {"activation": "relu2", "up_proj": None, "up_bias": np.zeros((4, 40), "f4")},
            ValueError,
            "up_bias must be None: activation relu2",
        ),
        (
            {"down_proj": [np.zeros((48, 40), bf16)] * 3 + [np.zeros((48, 41), bf16)]},
            ValueError,
            r"down_proj\[3\] must have shape \[H=48, I=40\], got \[48, 41\]",
        ),
        (
            {"gate_bias": np.zeros((4, 40))},
            TypeError,
            "gate_bias must be float32 or float16 or bfloat16, got",
        ),
        ({"down_bias": np.zeros((4, 40), "f4")}, ValueError, r"down_bias must have shape \[E=4, H=48\], got"),
        ({"gpu_experts_mask": np.zeros(4, int)}, TypeError, "gpu_experts_mask must be bool, got int64"),
        (
            {"gpu_experts_mask": np.zeros(3, bool)},
            ValueError,
            r"gpu_experts_mask must have shape \[E=4\], got",
        ),
        (
            {"physical_to_logical_map": np.array([0, 1, 2, 4])},
            ValueError,
            r"physical_to_logical_map\[3\] = 4: expected 0 to 3",
        ),
        (
            {"physical_to_logical_map": np.array([0, -1, 2, 3])},
            ValueError,
            r"physical_to_logical_map\[1\] = -1: expected 0 to 3",
        ),
        ({"physical_to_logical_map": np.zeros(4, "i4")}, TypeError, "map must be int64, got int32"),
        ({"base": np.zeros((5, 47), "f4")}, ValueError, r"base must have shape \[T=5, H=48\], got \[5, 47\]"),
        ({"base": np.zeros((5, 48), "i4")}, TypeError, "base must be float32 or .* got int32"),
        (
            {"out_dtype": np.float16},
            ValueError,
            "out_dtype must be bfloat16, float32 or float64, got float16",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = {**draw_layer(0), **change}
    for function in (moe_forward, error_bound):
        with pytest.raises(error, match=message):
            function(**layer)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint64])
def test_an_id_that_is_too_large_is_an_error(dtype: type) -> None:
    layer = draw_layer(0)
    layer["topk_ids"] = np.zeros((5, 2), dtype)
    layer["topk_ids"][3, 1] = 4
    with pytest.raises(
        IndexError, match=r"topk_ids\[3, 1\] = 4: expected an id below the number of experts, 4"
    ):
        moe_forward(**layer)
    layer["topk_ids"][3, 1] = np.iinfo(dtype).max
    with pytest.raises(IndexError, match=r"topk_ids\[3, 1\] = "):
        moe_forward(**layer)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (
            moe_forward,
            {"accumulate_dtype": np.float16},
            "accumulate_dtype must be float32 or float64, got float16",
        ),
        (error_bound, {"max_chain": 0}, "max_chain must be at least 1, got 0"),
        (error_bound, {"sigmas": 0.0}, "sigmas must be above 0, got 0.0"),
    ],
)
def test_wrong_options(function: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**draw_layer(0), **options)
