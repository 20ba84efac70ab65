"""Quantization to the bit, what comes back exactly, and the edges of the formats."""

from __future__ import annotations

import doctest
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantize_draws import COLUMNS, LARGEST, POWERS, SEEDS, draw, f32, in_groups
from reference_cases import AnyArray, bf16

import ktmoe_np.reference.packing
import ktmoe_np.reference.quantize
import ktmoe_np.reference.quantized
from ktmoe_np.reference import (
    dequantize,
    gradient_weights,
    quantize_int4,
    quantize_int8,
)


def test_doctests() -> None:
    for name in ("packing", "quantize", "quantized"):
        assert doctest.testmod(getattr(ktmoe_np.reference, name)).failed == 0


def lane_sum(values: list[Any]) -> Any:
    lanes = [f32(0)] * 16
    for i, value in enumerate(values):
        lanes[i % 16] += value
    for half in (8, 4, 2, 1):
        lanes = [lanes[j] + lanes[j + half] for j in range(half)]
    return lanes[0]


def normalizer(amax: Any) -> Any:
    return f32(2.0 ** min(127, 1 - int(np.floor(np.log2(float(amax))))))


def int4_row(row: AnyArray, g: int) -> tuple[list[int], list[int], Any]:
    """The steps of `quantize_int4` one number at a time: q, m and channel_scale."""
    padded = [f32(w) for w in row] + [f32(0)] * (-len(row) % g)
    amax = max(abs(w) for w in padded)
    if amax == 0:
        return [0] * len(row), [1] * (len(padded) // g), f32(0)
    power = normalizer(amax)
    v = [w * power for w in padded]
    groups = [v[i : i + g] for i in range(0, len(v), g)]
    together = 0
    for value in v:
        together |= int(np.rint(f32(32) * value))
    tries = []
    for s in (amax * power / f32(128), f32((together & -together) or 1) / f32(32)):
        total, multipliers = f32(0), []
        for group in groups:
            high, low = max(group), max(-x for x in group)
            sign = f32(-1 if high > low else 1)
            b = np.rint(max(high, low) / (s * f32(8.25)))
            candidates = []
            for o in (-1, 0, 1, 2):
                m = sign * min(max(b + f32(o), f32(1)), f32(15))
                t = [x * (f32(1) / (s * m)) for x in group]
                q = [min(max(np.rint(x), f32(-8)), f32(7)) for x in t]
                errors = [(x - y) * (x - y) for x, y in zip(t, q, strict=True)]
                candidates.append((lane_sum(errors) * (m * m), m))
            error, m = min(candidates, key=lambda candidate: float(candidate[0]))
            total += error
            multipliers.append(m)
        tries.append(((s * s) * total, s, multipliers))
    _, s, m = tries[1] if tries[1][0] < tries[0][0] else tries[0]
    q = [min(max(np.rint(x * (f32(1) / (s * m[i // g]))), f32(-8)), f32(7)) for i, x in enumerate(v)]
    c = [m[i // g] * x for i, x in enumerate(q)]
    s = lane_sum([x * y for x, y in zip(v, c, strict=True)]) / lane_sum([x * x for x in c])
    channel_scale = min(s / power, f32(LARGEST) / max(abs(x) for x in c))
    return [int(x) for x in q[: len(row)]], [int(x) for x in m], channel_scale


@given(SEEDS, COLUMNS, st.sampled_from([32, 64, 128]), POWERS, st.sampled_from([bf16, np.float32]))
def test_int4_is_the_loop_bit_for_bit(seed: int, K: int, g: int, power: int, dtype: Any) -> None:
    weights = draw(seed, 2, K, power=power, dtype=dtype)
    with np.errstate(all="raise"):
        matrix = quantize_int4(weights, group_size=g)
    for n in range(2):
        q, m, channel_scale = int4_row(weights[n], g)
        assert matrix.q[n].tolist() == q
        assert matrix.multiplier[n].tolist() == m
        assert matrix.channel_scale[n].tobytes() == channel_scale.tobytes()


def int8_row(row: list[Any]) -> tuple[list[int], Any]:
    """The formulas of `quantize_int8` for a row, one number at a time: codes and scale."""
    scale = max(abs(w) for w in row) / f32(127)
    return [int(min(max(np.rint(w / scale), -127), 127)) if scale else 0 for w in row], scale


def int8_group(group: list[Any]) -> tuple[list[int], Any]:
    """The steps of `quantize_int8` for a group, one number at a time: codes and scale."""
    amax = max(abs(w) for w in group)
    power = normalizer(amax) if amax else f32(1)
    v = [w * power for w in group]
    tries = []
    for d in (127, *(127.25 - i / 2 for i in range(15))):
        s = min(amax / f32(d), f32(LARGEST) / f32(127))
        step = s * power
        q = [min(max(np.rint(x * (f32(1) / step)), f32(-127)), f32(127)) if step else f32(0) for x in v]
        errors = [x - (y * step).astype(bf16).astype(f32) for x, y in zip(v, q, strict=True)]
        tries.append((lane_sum([e * e for e in errors]), q, s))
    _, q, s = min(tries, key=lambda one: float(one[0]))
    return [int(x) for x in q], s


@given(SEEDS, COLUMNS, st.sampled_from([None, 1, 32, 50]), POWERS, st.sampled_from([bf16, np.float32]))
def test_int8_is_the_loop_bit_for_bit(seed: int, K: int, g: int | None, power: int, dtype: Any) -> None:
    weights = draw(seed, 2, K, power=power, dtype=dtype)
    with np.errstate(all="raise"):
        matrix: Any = quantize_int8(weights) if g is None else quantize_int8(weights, group_size=g)
    scales = matrix.channel_scale[:, None] if g is None else matrix.group_scale
    size = K if g is None else g
    for n, start in itertools.product(range(2), range(0, K, size)):
        group = [f32(w) for w in weights[n, start : start + size]]
        codes, scale = int8_row(group) if g is None else int8_group(group)
        assert scales[n, start // size].tobytes() == scale.tobytes()
        assert matrix.codes[n, start : start + size].tolist() == codes


@given(SEEDS, COLUMNS, st.sampled_from([32, 64, 128]), st.integers(-126, 124), st.booleans())
def test_int4_of_a_power_of_two_times_nibbles_is_exact(
    seed: int, K: int, g: int, power: int, small: bool
) -> None:
    rng = np.random.default_rng(seed)
    q = rng.integers(-8, 8, (3, K)) // (1 + rng.integers(0, 8) * small)
    weights = np.ldexp(q.astype(np.float64), power).astype(f32).astype(bf16)
    matrix = quantize_int4(weights, group_size=g)
    np.testing.assert_array_equal(dequantize(matrix), weights.astype(f32))
    np.testing.assert_array_equal(gradient_weights(matrix), weights)


@given(SEEDS, st.integers(1, 5), st.sampled_from([32, 64, 128]), st.integers(-120, 115))
def test_int4_of_two_levels_with_a_power_of_two_is_exact(seed: int, G: int, g: int, power: int) -> None:
    rng = np.random.default_rng(seed)
    m = rng.integers(1, 16, (4, G, 1)) * rng.choice([-1, 1], (4, G, 1))
    q = rng.integers(-8, 8, (4, G, g))
    # Groups hold a largest |q| or are small; odd numbers in the first one make the common power of two 1.
    q[:, :, 0] = rng.choice([-8, 7], (4, G))
    small = rng.random((4, G)) < 0.3
    m[small], q[small] = 1, rng.integers(-7, 8, (np.count_nonzero(small), g))
    m[:, 0], q[:, 0, 1:] = 2 * rng.integers(4, 8, (4, 1)) + 1, 7
    weights = np.ldexp((m * q).reshape(4, -1).astype(np.float64), power).astype(f32).astype(bf16)
    np.testing.assert_array_equal(dequantize(quantize_int4(weights, group_size=g)), weights.astype(f32))


@given(SEEDS, COLUMNS, st.sampled_from([None, 32]), st.integers(-149, 120), st.sampled_from([1, 8, 17]))
def test_int8_of_its_own_codes_is_exact(seed: int, K: int, g: int | None, power: int, digits: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (3, K)).astype(np.int8)
    codes[:, :: g or K] = 127
    whole = rng.integers(1, 2**digits, (3, -(-K // (g or K))))
    scale = np.ldexp(whole.astype(np.float64), min(power, 121 - digits)).astype(f32)
    weights = codes * np.repeat(scale, g or K, axis=1)[:, :K]
    matrix: Any = quantize_int8(weights) if g is None else quantize_int8(weights, group_size=g)
    np.testing.assert_array_equal(matrix.codes, codes)
    np.testing.assert_array_equal(matrix.channel_scale[:, None] if g is None else matrix.group_scale, scale)
    np.testing.assert_array_equal(dequantize(matrix), weights)


@given(SEEDS, COLUMNS, POWERS)
def test_decoded_weights_are_near_and_finite(seed: int, K: int, power: int) -> None:
    weights = draw(seed, 3, K, power=power)
    wide = weights.astype(np.float64)
    amax = np.abs(wide).max(axis=1, keepdims=True)
    # Scales that are denormal have an error of half of 2^-149.
    slack = 127 * 2.0**-150
    for matrix, steps in ((quantize_int8(weights), 127), (in_groups(weights), 120.25)):
        assert (np.abs(dequantize(matrix) - wide) <= amax / steps * 0.5001 + slack).all()
    for g in (32, 64, 128):
        matrix = quantize_int4(weights, group_size=g)
        for decoded in (dequantize(matrix), gradient_weights(matrix)):
            assert np.isfinite(decoded.astype(f32)).all()
        # What clipping 8.53 to 7 costs, and a scale that fits the others better.
        assert (np.abs(dequantize(matrix) - wide) <= amax * 0.25 + slack).all()


@given(SEEDS, st.integers(-100, 100))
def test_a_power_of_two_scales_through(seed: int, power: int) -> None:
    weights = draw(seed, 3, 70)
    scaled = np.ldexp(weights.astype(np.float64), power).astype(f32).astype(bf16)
    four, four_scaled = quantize_int4(weights), quantize_int4(scaled)
    eight, eight_scaled = quantize_int8(weights), quantize_int8(scaled)
    grouped, grouped_scaled = in_groups(weights), in_groups(scaled)
    for name in ("q", "multiplier"):
        np.testing.assert_array_equal(getattr(four_scaled, name), getattr(four, name))
    np.testing.assert_array_equal(eight_scaled.codes, eight.codes)
    np.testing.assert_array_equal(grouped_scaled.codes, grouped.codes)
    np.testing.assert_array_equal(four_scaled.channel_scale, np.ldexp(four.channel_scale, power))
    np.testing.assert_array_equal(eight_scaled.channel_scale, np.ldexp(eight.channel_scale, power))
    np.testing.assert_array_equal(grouped_scaled.group_scale, np.ldexp(grouped.group_scale, power))


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("normal", (0.0842, 0.0923, 0.099)),
        ("student", (0.12, 0.14, 0.16)),
        ("laplace", (0.107, 0.121, 0.135)),
    ],
)
def test_int4_finds_a_small_error(kind: str, limits: tuple[float, ...]) -> None:
    rng = np.random.default_rng(5)
    shape = 128, 2048
    weights = {
        "normal": rng.standard_normal(shape),
        "student": rng.standard_t(4, shape),
        "laplace": rng.laplace(size=shape),
    }[kind].astype(f32)
    for g, limit in zip((32, 64, 128), limits, strict=True):
        error = np.linalg.norm(dequantize(quantize_int4(weights, group_size=g)) - weights)
        assert error < limit * np.linalg.norm(weights)


def test_zero_rows() -> None:
    weights = np.zeros((2, 3, 40), bf16)
    weights[1, 2] = 1
    weights[0, 1] = -0.0
    four, eight, grouped = quantize_int4(weights), quantize_int8(weights), in_groups(weights)
    zero = np.ones((2, 3), bool)
    zero[1, 2] = False
    for scale in (four.channel_scale, eight.channel_scale, grouped.group_scale[..., 1]):
        np.testing.assert_array_equal(scale == 0, zero)
    assert (four.multiplier[zero] == 1).all()
    for matrix in (four, eight, grouped):
        assert not matrix.codes[zero].any()
        np.testing.assert_array_equal(gradient_weights(matrix), weights)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 7), (0, 3, 7), (1, 1)])
def test_empty_matrices(shape: tuple[int, ...]) -> None:
    for matrix in (
        quantize_int4(np.ones(shape, bf16)),
        quantize_int8(np.ones(shape, bf16)),
        quantize_int8(np.ones(shape, bf16), group_size=4),
    ):
        assert matrix.shape == shape
        assert dequantize(matrix).shape == shape


@pytest.mark.parametrize("value", [LARGEST, 2.0**-133, 2.0**-126, 3e38])
def test_the_edges_of_bfloat16(value: float) -> None:
    weights = (np.array([[1, -1, 0.5, 0, 0.25, 1]]) * value).astype(f32).astype(bf16)
    for matrix in (quantize_int8(weights), quantize_int4(weights), quantize_int8(weights, group_size=4)):
        decoded = dequantize(matrix).astype(np.float64)
        assert (np.abs(decoded - weights.astype(np.float64)) <= 0.2 * value).all()
        assert (matrix.codes[0, [0, 5]] > 0).all()
        assert matrix.codes[0, 1] < 0


def test_no_decoded_weight_overflows() -> None:
    # Without a limit the scale of least squares would take the largest code beyond the largest number.
    weights = np.array([[1, -1] * 12 + [0.61, 0.33]]) * LARGEST
    weights = weights.astype(f32).astype(bf16)
    matrix = quantize_int4(weights)
    limit = f32(LARGEST) / np.abs(matrix.codes).max().astype(f32)
    assert int4_row(weights[0], 32)[2] == matrix.channel_scale[0] == limit
    assert float(gradient_weights(matrix).astype(f32).max()) == LARGEST
    # Nor do the largest float32, which bfloat16 takes for infinite, under the smallest of the tried scales.
    weights = np.linspace(-1, 1, 33, dtype=f32)[None] * np.finfo(f32).max
    decoded = gradient_weights(in_groups(weights)).astype(f32)
    assert np.abs(decoded).max() == LARGEST


def test_a_scale_that_vanishes_gives_zeros() -> None:
    smallest = np.full((1, 3), 2.0**-149, f32)
    for matrix in (quantize_int8(smallest), in_groups(smallest)):
        assert not dequantize(matrix).any()
        assert not matrix.codes.any()


@given(SEEDS, st.integers(1, 80), st.sampled_from([bf16, np.float16, np.float32]))
def test_the_dtype_of_the_weights_does_not_matter(seed: int, K: int, dtype: Any) -> None:
    weights = draw(seed, 2, 3, K, dtype=dtype)
    for quantize in (quantize_int4, quantize_int8, in_groups):
        got, expected = quantize(weights), quantize(weights.astype(f32))
        np.testing.assert_array_equal(dequantize(got), dequantize(expected))
        np.testing.assert_array_equal(dequantize(got[1]), dequantize(quantize(weights[1])))
