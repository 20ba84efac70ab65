"""Quantized matrices: their bytes, the weights of products, quantized activations, and every refusal."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantize_draws import COLUMNS, POWERS, SEEDS, draw, f32, in_groups, nibbles
from reference_cases import bf16

from ktmoe_np.reference import (
    Int4Matrix,
    Int8GroupMatrix,
    Int8Matrix,
    dequantize,
    gradient_weights,
    pack_int4,
    pack_int8,
    product_weights,
    quantize_activations,
    quantize_int4,
    quantize_int8,
    unpack_int4,
    unpack_int8,
)


def random_int4(seed: int, *shape: int, g: int = 32) -> Int4Matrix:
    rng = np.random.default_rng(seed)
    groups = -(-shape[-1] // g)
    m = rng.integers(1, 16, (*shape[:-1], groups)) * rng.choice([-1, 1], (*shape[:-1], groups))
    return Int4Matrix(nibbles(seed, *shape), m.astype(np.int8), rng.random(shape[:-1], f32), g)


@given(SEEDS, COLUMNS, st.sampled_from([32, 64, 128]))
def test_int4_bytes_round_trip(seed: int, K: int, g: int) -> None:
    matrix = random_int4(seed, 2, 3, K, g=g)
    rows = pack_int4(matrix)
    assert rows.shape == (2, 3, (K + 1) // 2 + -(-K // g))
    for e, n in itertools.product(range(2), range(3)):
        expected = [0] * ((K + 1) // 2)
        for k in range(K):
            expected[k // 2] |= (int(matrix.q[e, n, k]) & 15) << 4 * (k % 2)
        assert rows[e, n].tolist() == expected + [int(m) & 255 for m in matrix.multiplier[e, n]]
    again = unpack_int4(rows, matrix.channel_scale, K, group_size=g)
    for name in ("q", "multiplier", "channel_scale"):
        np.testing.assert_array_equal(getattr(again, name), getattr(matrix, name))
    assert again.group_size == g


@given(SEEDS, COLUMNS)
def test_int8_bytes_round_trip(seed: int, K: int) -> None:
    matrix, grouped = quantize_int8(draw(seed, 2, 3, K)), in_groups(draw(seed, 2, 3, K))
    rows = pack_int8(matrix)
    np.testing.assert_array_equal(rows.view(np.int8), matrix.codes)
    np.testing.assert_array_equal(unpack_int8(rows, matrix.channel_scale, K).codes, matrix.codes)
    rows = pack_int8(grouped)
    for e, n in itertools.product(range(2), range(3)):
        scales = grouped.group_scale[e, n].astype("<f4").tobytes()
        assert rows[e, n].tobytes() == grouped.codes[e, n].tobytes() + scales
    again = unpack_int8(rows, None, K)
    np.testing.assert_array_equal(again.codes, grouped.codes)
    np.testing.assert_array_equal(again.group_scale, grouped.group_scale)


def test_product_weights() -> None:
    four, eight = random_int4(1, 2, 3, 50), quantize_int8(draw(1, 2, 3, 50))
    grouped = in_groups(draw(1, 2, 3, 50))
    for matrix in (four, eight):
        np.testing.assert_array_equal(product_weights(matrix), matrix.codes.astype(bf16))
        scaled = matrix.codes.astype(f32) * matrix.channel_scale[..., None]
        np.testing.assert_array_equal(dequantize(matrix), scaled)
        np.testing.assert_array_equal(gradient_weights(matrix), scaled.astype(bf16))
    scaled = grouped.codes.astype(f32) * np.repeat(grouped.group_scale, 32, axis=2)[..., :50]
    for function in (product_weights, gradient_weights):
        np.testing.assert_array_equal(function(grouped), scaled.astype(bf16))


@given(SEEDS, st.integers(0, 5), st.integers(0, 70), POWERS)
def test_activations_are_quantized_by_row(seed: int, M: int, K: int, power: int) -> None:
    x = draw(seed, M, K, power=power)
    with np.errstate(all="raise"):
        codes, scale = quantize_activations(x)
    expected = quantize_int8(x)
    np.testing.assert_array_equal(codes, expected.codes)
    np.testing.assert_array_equal(scale, expected.channel_scale)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_poisons_its_row_of_activations(value: float) -> None:
    x = draw(0, 4, 30)
    clean_codes, clean_scale = quantize_activations(x)
    x[2, 7] = value
    codes, scale = quantize_activations(x)
    others = np.arange(4) != 2
    np.testing.assert_array_equal(codes[others], clean_codes[others])
    np.testing.assert_array_equal(scale[others], clean_scale[others])
    assert not codes[2].any()
    assert np.isnan(scale[2])


@pytest.mark.parametrize("quantize", [quantize_int4, quantize_int8, in_groups])
@pytest.mark.parametrize(
    ("value", "kind"), [(np.nan, "NaN"), (np.inf, "an infinity"), (-np.inf, "an infinity")]
)
def test_weights_that_are_not_finite_are_refused(quantize: Any, value: float, kind: str) -> None:
    weights = draw(0, 5, 20, 40)
    weights[3, 17, 39] = value
    with pytest.raises(
        ValueError, match=f"^gate_proj: expert 3, row 17: got {kind}, expected finite weights"
    ):
        quantize(weights, name="gate_proj")
    with pytest.raises(ValueError, match=f"^weights: row 17: got {kind}, expected finite weights$"):
        quantize(weights[3])


codes, scale = np.ones((2, 3), np.int8), np.ones(2, f32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize_int8([[1.0]]), TypeError, "weights: got list, expected a NumPy array"),
        (
            lambda: quantize_int4(np.ones((2, 2)), name="up_proj"),
            TypeError,
            "up_proj: got float64, expected bfloat16 or float16 or float32",
        ),
        (
            lambda: quantize_int8(np.ones(2, f32)),
            ValueError,
            r"weights: got shape \[2\], expected \[..., N, K\]",
        ),
        (
            lambda: quantize_int8(np.ones((2, 2), f32), group_size=0),
            ValueError,
            "group_size: got 0, expected at least 1",
        ),
        (
            lambda: quantize_int4(np.ones((2, 2), f32), group_size=16),
            ValueError,
            "group_size: got 16, expected 32, 64 or 128",
        ),
        (lambda: Int8Matrix([[1]], scale), TypeError, "codes: got list, expected a NumPy array"),
        (lambda: Int8Matrix(codes.astype(int), scale), TypeError, "codes: got int64, expected int8"),
        (lambda: Int8Matrix(codes[0], scale), ValueError, r"codes: got shape \[3\], expected \[..., N, K\]"),
        (lambda: Int8Matrix(codes, scale[:1]), ValueError, r"channel_scale: got shape \[1\], expected \[2\]"),
        (
            lambda: Int8Matrix(codes * np.int8(-128), scale),
            ValueError,
            "codes: got -128, expected from -127 to 127",
        ),
        (
            lambda: Int8GroupMatrix(codes, scale[:, None], group_size=2),
            ValueError,
            r"group_scale: got shape \[2, 1\], expected \[2, 2\]",
        ),
        (
            lambda: Int8GroupMatrix(codes, scale[:, None], group_size=0),
            ValueError,
            "group_size: got 0, expected at least 1",
        ),
        (
            lambda: Int4Matrix(codes, codes[:, :1], scale, 31),
            ValueError,
            "group_size: got 31, expected 32, 64 or 128",
        ),
        (
            lambda: Int4Matrix(codes, codes, scale),
            ValueError,
            r"multiplier: got shape \[2, 3\], expected \[2, 1\]",
        ),
        (
            lambda: Int4Matrix(codes * np.int8(8), codes[:, :1], scale),
            ValueError,
            "q: got 8, expected from -8 to 7",
        ),
        (
            lambda: Int4Matrix(codes, codes[:, :1] * np.int8(16), scale),
            ValueError,
            "multiplier: got 16, expected from -15 to 15",
        ),
        (
            lambda: Int4Matrix(codes, codes[:, :1] * np.int8(0), scale),
            ValueError,
            "multiplier: got 0, expected from -15 to 15, but not 0",
        ),
        (
            lambda: unpack_int4(np.ones((2, 3), np.int8), scale, 3),
            TypeError,
            "rows: got int8, expected an array of uint8",
        ),
        (lambda: unpack_int8([[1]], scale, 3), TypeError, "rows: got list, expected an array of uint8"),
        (
            lambda: unpack_int4(np.ones((2, 4), np.uint8), scale, 3),
            ValueError,
            r"rows: got shape \[2, 4\], expected \[..., N, 3\]",
        ),
        (
            lambda: unpack_int8(np.ones((2, 4), np.uint8), None, 3),
            ValueError,
            r"rows: got shape \[2, 4\], expected \[..., N, 7\]",
        ),
    ],
)
def test_refusals(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
