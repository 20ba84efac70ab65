"""The derivatives of the activations against differences of the activations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gradient_bound import curvatures
from reference_cases import FORMULAS, AnyArray

from ktmoe_np.config import ActivationSpec, activation_names, parse_activation
from ktmoe_np.reference import activate, activate_gradients
from ktmoe_np.reference.activation import gate_factor, gate_slope, up_slope


def call(function: Any, activation: Any, g: AnyArray, u: AnyArray) -> Any:
    return function(activation, g, u if parse_activation(activation).gated else None)


def grid(dtype: type, *values: float) -> tuple[AnyArray, AnyArray]:
    axis: AnyArray = np.array(values, dtype)
    return np.repeat(axis, axis.size), np.tile(axis, axis.size)


#: Every activation, and those with parameters also with others.
CASES = {
    **{name: name for name in activation_names()},
    **{name: given for name, (given, _) in FORMULAS.items()},
}


def _without_limit(spec: ActivationSpec) -> ActivationSpec:
    return replace(spec, limit=math.inf)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_differences(name: str) -> None:
    activation = CASES[name]
    spec = parse_activation(activation)
    drawn = np.random.default_rng(0).normal(scale=3.0, size=(2, 500))
    step = 1e-5
    # A step across a clamp, or across 0, has no derivative.
    far = ~(np.abs(np.abs(drawn) - spec.limit) < 2 * step).any(axis=0) & ~(np.abs(drawn[0]) < 2 * step)
    g, u = drawn[:, far]
    slopes = call(activate_gradients, activation, g, u)
    for slope, move in zip(slopes, ((step, 0.0), (0.0, step)), strict=True):
        if slope is None:
            assert not spec.gated
            continue
        ahead, behind = (call(activate, activation, g + s * move[0], u + s * move[1]) for s in (1, -1))
        difference = (ahead - behind) / (2 * step)
        # Some clamp what the gate gives.
        sure = np.abs(gate_factor(_without_limit(spec), g) - spec.limit) > 4 * step
        np.testing.assert_allclose(slope[sure], difference[sure], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_float64_to_some_ulps(name: str) -> None:
    activation = CASES[name]
    rng = np.random.default_rng(1)
    g, u = (rng.normal(scale=scale, size=3000).astype(np.float32) for scale in (4.0, 4.0))
    single = call(activate_gradients, activation, g, u)
    double = call(activate_gradients, activation, g.astype(np.float64), u.astype(np.float64))
    for got, expected in zip(single, double, strict=True):
        if expected is not None:
            assert got.dtype == np.float32
            assert expected.dtype == np.float64
            tolerance = 16 * 2.0**-24 * (1 + np.abs(g)) * (2 + np.abs(u))
            assert (np.abs(got - expected) <= tolerance).all()


@pytest.mark.parametrize("kind", ["silu", "swigluoai", "swiglustep"])
def test_the_boundary_of_a_clamp_is_inside(kind: str) -> None:
    half, one = np.array([0.5], np.float32), np.array([1.0], np.float32)
    gate = np.array([2.0], np.float32)
    # swiglustep clamps g * sig(g), the others g.
    clamped = activate("silu", gate, one) if kind == "swiglustep" else gate
    at, without = ({"kind": kind, "limit": limit} for limit in (float(clamped[0]), 1e30))
    further = gate * np.float32(1.0001)
    assert activate_gradients(at, gate, half)[0] == activate_gradients(without, gate, half)[0] != 0
    assert activate_gradients(at, further, half)[0] == 0
    for up in (clamped, -clamped):
        further = np.nextafter(up, up * 2)
        assert activate_gradients(at, half, up)[1] == activate_gradients(without, half, up)[1] != 0
        assert activate_gradients(at, half, further)[1] == 0


@pytest.mark.parametrize("name", activation_names())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_numbers_overflow_nothing(name: str, dtype: type) -> None:
    spec = parse_activation(name)
    large = float(np.finfo(dtype).max) / (4 if name == "relu2" else 1)  # 2 g may overflow
    g, u = grid(dtype, 0, -0.0, 1, -1, 30, -30, 90, -90, 800, -800, 1e18, -1e18, large, -large)
    with np.errstate(all="raise"):
        d_gate, d_up = call(activate_gradients, name, g, u)
        moderate = (np.abs(u) < 1e19) & (np.abs(g) < 1e3)
        assert np.isfinite(d_gate[moderate]).all()
        assert d_up is None or np.isfinite(d_up[moderate]).all()
    with np.errstate(all="ignore"):
        assert np.isfinite(gate_slope(spec, g)).all()
        assert np.isfinite(up_slope(spec, u)).all()
        slope = gate_slope(spec, np.array([large, -large], dtype))
    asymptotes = {"swigluoai": 0.0, "swiglustep": 0.0, "situ": 0.0, "relu2": 2 * large}
    assert slope[0] == dtype(asymptotes.get(spec.kind, 1.0))
    assert slope[1] == 0


@pytest.mark.parametrize("name", activation_names())
def test_nan_stays(name: str) -> None:
    values = np.array([0, 1, -9, 50], np.float32)
    nan = np.full_like(values, np.nan)
    with np.errstate(all="raise"):
        for operands in ((nan, values), (values, nan), (nan, nan)):
            slopes = call(activate_gradients, name, *operands)
            if parse_activation(name).gated or np.isnan(operands[0]).all():
                assert all(np.isnan(slope).all() for slope in slopes if slope is not None)


@pytest.mark.parametrize("name", activation_names())
def test_derivatives_take_any_shape(name: str) -> None:
    for shape in ((), (0,), (2, 0), (2, 3, 4)):
        for slope in call(activate_gradients, name, np.zeros(shape, "f4"), np.zeros(shape, "f4")):
            assert slope is None or slope.shape == shape


@pytest.mark.parametrize("name", activation_names())
def test_the_curvatures_that_the_bound_of_the_gradients_assumes(name: str) -> None:
    spec = parse_activation(name)
    x, step = np.linspace(-30, 30, 60_001), 1e-3
    for function in (gate_slope, up_slope):
        slopes = np.array([function(spec, x + shift) for shift in (-step, 0.0, step)])
        smooth = (np.abs(np.diff(slopes, axis=0)) < 0.1).all(axis=0)  # away from the jumps at clamps
        second = np.abs(slopes[2] - slopes[0]) / (2 * step)
        third = np.abs(slopes[2] - 2 * slopes[1] + slopes[0]) / step**2
        assert second[smooth].max(initial=0) <= curvatures(spec)[0]
        corners = (0.0,) if name == "relu2" else ()
        off = smooth & np.all([np.abs(x - corner) > 2 * step for corner in corners], axis=0)
        assert third[off].max(initial=0) <= curvatures(spec)[1]


ONE, TWO = np.ones(1, np.float32), np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("silu", ONE.astype("f2"), ONE.astype("f2")),
            TypeError,
            "gate: got float16, expected float32 or float64",
        ),
        (("silu", ONE, ONE.astype(np.float64)), TypeError, "up: got float64, expected float32 like gate"),
        (("silu", ONE, TWO), ValueError, r"up: got shape \(2,\), expected \(1,\) like gate"),
        (("silu", ONE, None), ValueError, "up: got None, expected an array with activation silu"),
        (("relu2", ONE, ONE), ValueError, r"up: got array\(.*, expected None with activation relu2"),
        (("sigmoid", ONE, ONE), ValueError, "activation: got 'sigmoid', expected one of silu"),
    ],
)
def test_activate_gradients_refuses(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        activate_gradients(*arguments)


def test_gelu_is_precise_far_below_zero() -> None:
    expected = math.erfc(6.0 / math.sqrt(2)) / 2 - 6 * math.exp(-18.0) / math.sqrt(2 * math.pi)
    slope = activate_gradients("gelu", np.array([-6.0]), np.array([1.0]))[0]
    assert abs(slope[0] / expected - 1) < 1e-12
