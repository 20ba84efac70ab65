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
        ({"hidden_states": [[1.0]]}, TypeError, "hidden_states: got list, expected a NumPy array"),
        ({"hidden_states": np.zeros((5, 48))}, TypeError, "hidden_states: got float64, expected bfloat16"),
        (
            {"hidden_states": np.zeros(48, bf16)},
            ValueError,
            r"hidden_states: got shape \[48\], expected \[T, H\]",
        ),
        (
            {"hidden_states": np.zeros((5, 47), bf16)},
            ValueError,
            r"gate_proj\[0\]: got shape \[40, 48\], expected \[I, H=47\]",
        ),
        ({"topk_ids": np.zeros((5, 2))}, TypeError, "topk_ids: got float64, expected an integer dtype"),
        ({"topk_ids": np.zeros((5, 2), bool)}, TypeError, "topk_ids: got bool, expected an integer dtype"),
        (
            {"topk_ids": np.zeros((4, 2), int)},
            ValueError,
            r"topk_ids: got shape \[4, 2\], expected \[T=5, P\]",
        ),
        (
            {"topk_weights": np.zeros((5, 3), np.float32)},
            ValueError,
            r"topk_weights: got shape \[5, 3\], expected \[T=5, P=2\]",
        ),
        ({"topk_weights": np.zeros((5, 2))}, TypeError, "topk_weights: got float64, expected float32"),
        (
            {"gate_proj": np.zeros((40, 48), bf16)},
            ValueError,
            r"gate_proj: got shape \[40, 48\], expected \[E, I, H\]",
        ),
        ({"gate_proj": []}, ValueError, "gate_proj: got 0 experts, expected some"),
        ({"gate_proj": 3}, TypeError, "gate_proj: got int, expected an array or a sequence of arrays"),
        ({"up_proj": np.zeros((3, 40, 48), bf16)}, ValueError, "up_proj: got 3 experts, expected 4"),
        (
            {"up_proj": np.zeros((4, 40, 48), "f8")},
            TypeError,
            r"up_proj\[0\]: got float64, expected bfloat16",
        ),
        ({"up_proj": None}, ValueError, r"up_proj: got None, expected \[E, I, H\]: activation silu is gated"),
        ({"activation": "relu2"}, ValueError, "up_proj: got ndarray, expected None: activation relu2"),
        (
            {"activation": "relu2", "up_proj": None, "up_bias": np.zeros((4, 40), "f4")},
            ValueError,
            "up_bias: got ndarray, expected None: activation relu2",
        ),
        (
            {"down_proj": [np.zeros((48, 40), bf16)] * 3 + [np.zeros((48, 41), bf16)]},
            ValueError,
            r"down_proj\[3\]: got shape \[48, 41\], expected \[H=48, I=40\]",
        ),
        (
            {"gate_bias": np.zeros((4, 40))},
            TypeError,
            "gate_bias: got .*, expected float32 or float16 or bfloat16",
        ),
        (
            {"down_bias": np.zeros((4, 40), "f4")},
            ValueError,
            r"down_bias: got shape \[4, 40\], expected \[E=4, H=48\]",
        ),
        ({"gpu_experts_mask": np.zeros(4, int)}, TypeError, "gpu_experts_mask: got int64, expected bool"),
        (
            {"gpu_experts_mask": np.zeros(3, bool)},
            ValueError,
            r"gpu_experts_mask: got shape .*, expected \[E=4\]",
        ),
        (
            {"physical_to_logical_map": np.array([0, 1, 2, 4])},
            ValueError,
            r"physical_to_logical_map: got expert 4 at 3, expected 0 to 3",
        ),
        (
            {"physical_to_logical_map": np.array([0, -1, 2, 3])},
            ValueError,
            r"physical_to_logical_map: got expert -1 at 1, expected 0 to 3",
        ),
        ({"physical_to_logical_map": np.zeros(4, "i4")}, TypeError, "map: got int32, expected int64"),
        ({"base": np.zeros((5, 47), "f4")}, ValueError, r"base: got shape \[5, 47\], expected \[T=5, H=48\]"),
        ({"base": np.zeros((5, 48), "i4")}, TypeError, "base: got int32, expected float32 or "),
        (
            {"out_dtype": np.float16},
            ValueError,
            "out_dtype: got float16, expected bfloat16, float32 or float64",
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
    with pytest.raises(IndexError, match=r"topk_ids: got expert 4 at \[3, 1\], expected ids below 4"):
        moe_forward(**layer)
    layer["topk_ids"][3, 1] = np.iinfo(dtype).max
    with pytest.raises(IndexError, match=r"topk_ids: got expert \d+ at \[3, 1\], expected"):
        moe_forward(**layer)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (
            moe_forward,
            {"accumulate_dtype": np.float16},
            "accumulate_dtype: got float16, expected float32 or float64",
        ),
        (error_bound, {"max_chain": 0}, "max_chain: got 0, expected at least 1"),
        (error_bound, {"sigmas": 0.0}, "sigmas: got 0.0, expected above 0"),
    ],
)
def test_wrong_options(function: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**draw_layer(0), **options)
