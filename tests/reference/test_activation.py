"""The activations and the rounding against independent formulas."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cases import FORMULAS, AnyArray, round_by_bits

import ktmoe_np.reference.activation
from ktmoe_np.config import activation_names, parse_activation
from ktmoe_np.reference import activate, round_bf16


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.reference.activation).failed == 0


def call(activation: Any, g: AnyArray, u: AnyArray) -> AnyArray:
    return activate(activation, g, u if parse_activation(activation).gated else None)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_are_their_formulas(name: str, dtype: type) -> None:
    activation, formula = FORMULAS[name]
    special = [0.0, 1.5, -1.5, 1e-6, -1e-6, 6.0, -6.0]
    drawn = np.random.default_rng(0).normal(scale=3.0, size=(2, 500))
    g: AnyArray = np.concatenate([special, drawn[0]]).astype(dtype)
    u: AnyArray = np.concatenate([special[::-1], drawn[1]]).astype(dtype)
    expected = np.array([formula(float(a), float(b)) for a, b in zip(g, u, strict=True)])
    got = call(activation, g, u)
    assert got.dtype == dtype
    # alpha is a float32, also in float64; gelu_tanh in the form 1 + tanh cancels in the formula here.
    tolerance = 4e-7 if dtype is np.float32 else 3e-8
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("name", activation_names())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_neither_warn_nor_lose_nan(name: str, dtype: type) -> None:
    large = float(np.finfo(dtype).max)
    values: AnyArray = np.array([0, -0.0, 1, -1, 90, -90, 800, -800, 1e18, -1e18, large, -large], dtype)
    g, u = (grid.ravel() for grid in np.meshgrid(values, values))
    with np.errstate(all="raise"):
        result = call(name, g, u)
        assert not np.isnan(result[(np.abs(g) < 1e3) & (np.abs(u) < 1e3)]).any()
        assert np.isnan(call(name, np.full_like(u, np.nan), u)).all()
        if parse_activation(name).gated:
            assert np.isnan(call(name, g, np.full_like(g, np.nan))).all()


ONE, TWO = np.ones(1, np.float32), np.ones(2, np.float32)


def test_activations_take_any_shape() -> None:
    for shape in ((), (0,), (2, 0), (2, 3, 4)):
        for name in activation_names():
            assert call(name, np.zeros(shape, np.float32), np.zeros(shape, np.float32)).shape == shape


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("silu", ONE.astype(np.float16), ONE.astype(np.float16)),
            TypeError,
            "gate: got float16, expected float32 or float64",
        ),
        (("silu", ONE, ONE.astype(np.float64)), TypeError, "up: got float64, expected float32 like gate"),
        (("silu", ONE, TWO), ValueError, r"up: got shape \(2,\), expected \(1,\) like gate"),
        (("silu", ONE, None), ValueError, "up: got None, expected an array with activation silu"),
        (("relu2", ONE, ONE), ValueError, r"up: got array\(.*, expected None with activation relu2"),
    ],
)
def test_activate_refuses(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        activate(*arguments)


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32)))
@settings(deadline=None)
def test_rounding_is_to_nearest_even(values: list[float]) -> None:
    got = round_bf16(np.array(values, np.float32))
    assert got.dtype == np.float32
    assert got.tolist() == [round_by_bits(value) for value in values]


def test_rounding_of_special_values() -> None:
    got = round_bf16(np.array([np.nan, np.inf, -np.inf, 1e300, -0.0]))
    np.testing.assert_array_equal(got, [np.nan, np.inf, -np.inf, np.inf, -0.0])
