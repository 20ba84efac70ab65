"""The product of int8 activations with integers: to the bit, what is not finite, extremes, accuracy."""

from __future__ import annotations

import doctest
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from integer_cases import ENCODINGS, draw_encoded, exact_fma, product_loop, round32
from reference_cases import AnyArray, bf16

import ktmoe_np.reference.int8_activations
import ktmoe_np.reference.quantize
from ktmoe_np.reference import IntegerMatrix, integer_product, quantize_activations, round_bf16
from ktmoe_np.reference.int8_activations import fma

SEEDS = st.integers(0, 2**32 - 1)
quick = settings(deadline=None, max_examples=60)
encodings = pytest.mark.parametrize("name", sorted(ENCODINGS))


def floats(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def finite_floats() -> st.SearchStrategy[np.float32]:
    """Float32 of any bits, most of them of about the same size, whose sums cancel and tie."""
    any_bits = st.integers(0, 2**32 - 1).map(floats).filter(lambda x: bool(np.isfinite(x)))
    few_bits = st.builds(lambda m, e: np.float32(m * 2.0**e), st.integers(-4097, 4097), st.integers(-30, 3))
    return st.one_of(any_bits, few_bits)


def draw_rows(rng: np.random.Generator, num_rows: int, num_columns: int) -> AnyArray:
    x = rng.standard_normal((num_rows, num_columns)) * np.exp2(rng.integers(-9, 9, (num_rows, 1)))
    return round_bf16(x.astype(np.float32))


def test_doctests() -> None:
    for module in (ktmoe_np.reference.int8_activations, ktmoe_np.reference.quantize):
        assert doctest.testmod(module).failed == 0


# ---- fma ----


@given(finite_floats(), finite_floats(), finite_floats())
@example(np.float32(2.0**-149), np.float32(0.5), np.float32(2.0**-149))  # half of the least number: a tie
@example(np.float32(2.0**-75), np.float32(-(2.0**-75)), np.float32(2.0**-149))
@example(np.float32(3.4028235e38), np.float32(2), np.float32(-3.4028235e38))
@example(np.float32(3.4028235e38), np.float32(2), np.float32(0))
@example(np.float32(1 + 2**-12), np.float32(1 + 2**-12), np.float32(2**25))
@example(np.float32(1 + 2**-23), np.float32(2**-24), np.float32(1))  # above a tie by less than float64 has
@example(np.float32(1 - 2**-24), np.float32(2**-24), np.float32(1))
@example(np.float32(-1), np.float32(2.0**-100), np.float32(1 + 2**-23))
@settings(deadline=None, max_examples=1000)
def test_fma_rounds_once(a: np.float32, b: np.float32, c: np.float32) -> None:
    got = fma(np.array([a]), np.array([b]), np.array([c]))
    assert got.dtype == np.float32
    assert got[0] == exact_fma(a, b, c)


@pytest.mark.parametrize("power", [0, 20, -60])
@pytest.mark.parametrize(
    ("factor", "other", "half"),
    [
        (1 + 2.0**-23, 1 - 2.0**-23, 0),  # 1 - 2^-46: less than half an ulp of c by less than float64 has
        (3705353, 9273, 35),  # 2^35 + 1: more than half an ulp
    ],
)
def test_fma_beside_ties_that_float64_rounds_to(factor: float, other: float, half: int, power: int) -> None:
    signs, ends = np.meshgrid([1, -1], [0, 1, 2, 3])
    c = (np.stack([signs, -signs]) * (2.0**24 + 2 * ends) * 2.0 ** (half + power)).astype(np.float32)
    a = np.broadcast_to(np.float32(factor) * signs, c.shape).astype(np.float32)
    b = np.full(c.shape, other * 2.0**power, np.float32)
    want = np.array([exact_fma(*abc) for abc in zip(a.flat, b.flat, c.flat, strict=True)]).reshape(c.shape)
    assert np.array_equal(fma(a, b, c), want)
    in_float64 = (a.astype(np.float64) * b + c).astype(np.float32)
    for sign in (1, -1):
        assert (in_float64 != want)[c * sign > 0].any()


def test_fma_around_ties() -> None:
    # a b is half an ulp of c but for some of the last bits of float64 beside c, and some behind them.
    rng = np.random.default_rng(0)
    a = rng.uniform(1, 2, 5000).astype(np.float32)
    b, c = np.float32(1) / a, (2.0**24 + 2 * rng.integers(0, 9, 5000)).astype(np.float32)
    want = np.array([exact_fma(*abc) for abc in zip(a, b, c, strict=True)])
    assert np.array_equal(fma(a, b, c), want)
    assert np.array_equal(fma(a, -b, -c), -want)
    assert len(np.unique(want - c)) == 2


def test_fma_of_what_is_not_finite() -> None:
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    a, b = np.float32([inf, inf, 0, nan, 1, 2]), np.float32([2, 0, inf, 0, 1, 3])
    c = np.float32([1, 1, 1, 1, -inf, nan])
    got = fma(a, b, c)
    assert np.array_equal(got, [inf, nan, nan, nan, -inf, nan], equal_nan=True)
    assert np.array_equal(fma(a[:1], b[:1], np.float32([-inf])), [nan], equal_nan=True)


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**30))
@quick
def test_the_rounding_of_the_tests(numerator: int, denominator: int) -> None:
    value = Fraction(numerator, denominator)
    got = round32(value)
    neighbors = [np.nextafter(got, np.float32(side)) for side in (-np.inf, np.inf)]
    error = abs(Fraction(float(got)) - value)
    for other in neighbors:
        away = abs(Fraction(float(other)) - value)
        assert error < away or (error == away and int(got.view(np.uint32)) % 2 == 0)


# ---- activations ----


@given(SEEDS, st.integers(0, 4), st.integers(0, 300), st.sampled_from([1, 3, 32, 128, 256]))
@quick
def test_blocks_are_rows_of_their_own(seed: int, M: int, K: int, block: int) -> None:
    x = draw_rows(np.random.default_rng(seed), M, K)
    codes, scale = quantize_activations(x, block)
    assert (codes.shape, scale.shape) == ((M, K), (M, -(-K // block)))
    assert (codes.dtype, scale.dtype) == (np.int8, np.float32)
    for b in range(scale.shape[1]):
        part = slice(b * block, (b + 1) * block)
        alone, scale_alone = quantize_activations(x[:, part])
        assert np.array_equal(codes[:, part], alone)
        assert np.array_equal(scale[:, b], scale_alone)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_of_its_block(value: float) -> None:
    x = draw_rows(np.random.default_rng(0), 2, 300)
    clean = quantize_activations(x, 128)
    x[1, 130] = value
    codes, scale = quantize_activations(x, 128)
    assert np.isnan(scale[1, 1])
    assert not codes[1, 128:256].any()
    codes[1, 128:256], scale[1, 1] = clean[0][1, 128:256], clean[1][1, 1]
    assert np.array_equal(codes, clean[0])
    assert np.array_equal(scale, clean[1])


def test_extremes_of_bfloat16_are_codes() -> None:
    for size in (2.0**-133, 2.0**-126, 3.3895314e38):
        x = np.float32([[size, -size, size / 2, 0]])
        codes, scale = quantize_activations(x, 4)
        assert codes.tolist() == [[127, -127, 64, 0]] or size == 2.0**-133
        assert np.abs(codes).max() == 127
        assert (scale > 0).all()


def test_a_block_has_a_size() -> None:
    with pytest.raises(ValueError, match="block: got 0, expected at least 1"):
        quantize_activations(np.zeros((1, 4), np.float32), 0)


# ---- the product ----


@given(SEEDS, st.sampled_from(sorted(ENCODINGS)), st.integers(0, 2), st.integers(1, 2), st.integers(1, 300))
@settings(deadline=None, max_examples=150)
def test_products_are_the_loop_to_the_bit(seed: int, name: str, M: int, N: int, K: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, _ = draw_encoded(rng, name, N, K)
    x = draw_rows(rng, M, matrix.shape[1])
    got = integer_product(x, matrix)
    assert got.dtype == np.float32
    assert got.tobytes() == product_loop(x, matrix).tobytes()


@given(SEEDS, st.integers(1, 70), *(st.integers(1, 40) for _ in range(3)), st.booleans())
@quick
def test_groups_and_blocks_of_any_sizes(
    seed: int, K: int, group: int, per: int, block: int, minima: bool
) -> None:
    rng = np.random.default_rng(seed)

    def integers(size: int) -> AnyArray:
        return rng.integers(-128, 128, (2, -(-K // size)), np.int8)

    scale, minimum = rng.standard_normal((2, 2, -(-K // group))).astype(np.float32)
    some: Any = {"minimum": minimum, "minimum_multiplier": integers(per)} if minima else {}
    matrix = IntegerMatrix(
        integers(1), scale, group, integers(per), multiplier_size=per, activation_block=block, **some
    )
    x = draw_rows(rng, 2, K)
    assert integer_product(x, matrix).tobytes() == product_loop(x, matrix).tobytes()


@encodings
def test_the_product_in_float64(name: str) -> None:
    rng = np.random.default_rng(2)
    matrix, _ = draw_encoded(rng, name, 7, 500)
    x = draw_rows(rng, 5, matrix.shape[1])
    codes, scale = quantize_activations(x, matrix.activation_block)
    decoded = codes * np.repeat(scale, matrix.activation_block, axis=1)[:, : x.shape[1]].astype(np.float64)
    weights = matrix.values(np.float64)
    want = decoded @ weights.T * (1 if matrix.channel_scale is None else matrix.channel_scale)
    got = integer_product(x.astype(np.float64), matrix)
    assert got.dtype == np.float64
    reach = np.abs(decoded) @ np.abs(weights).T + np.abs(want)
    assert (np.abs(got - want) <= 1e-12 * (1 + reach)).all()


@encodings
def test_the_error_is_that_of_activations_in_int8(name: str) -> None:
    rng = np.random.default_rng(1)
    matrix, decoded = draw_encoded(rng, name, 64, 1024)
    x = round_bf16(rng.standard_normal((32, 1024), np.float32))
    weights = getattr(decoded, "codes", decoded).astype(np.float64)
    truth = x.astype(np.float64) @ weights.T
    if matrix.channel_scale is not None:
        truth *= matrix.channel_scale
    error = integer_product(x, matrix) - truth
    assert np.linalg.norm(error) <= 0.020 * np.linalg.norm(truth)
    assert np.linalg.norm(error) >= 0.001 * np.linalg.norm(truth)


@encodings
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_own_row_nan(name: str, value: float) -> None:
    rng = np.random.default_rng(1)
    matrix, _ = draw_encoded(rng, name, 3, 512)
    x = draw_rows(rng, 3, 512)
    clean = integer_product(x, matrix)
    for k, others in ((0, x[1]), (511, 0), (200, 0)):
        poisoned = x.copy()
        poisoned[1] = others
        poisoned[1, k] = value
        with np.errstate(all="raise"):
            got = integer_product(poisoned, matrix)
        assert np.isnan(got[1]).all()
        assert np.array_equal(got[::2], clean[::2])


def test_a_nan_is_not_lost_in_weights_of_zeros() -> None:
    matrix = IntegerMatrix(np.zeros((2, 300), "i1"), np.zeros((2, 10), "f4"), 32)
    x = np.zeros((1, 300), np.float32)
    assert not integer_product(x, matrix).any()
    x[0, 299] = np.nan
    assert np.isnan(integer_product(x, matrix)).all()


@encodings
def test_zeros_give_zeros(name: str) -> None:
    matrix, _ = draw_encoded(np.random.default_rng(1), name, 3, 512)
    x = np.zeros((2, 512), np.float32)
    with np.errstate(all="raise"):
        assert not integer_product(x, matrix).any()
    x[1, 300] = 1  # the other block is of zeros
    assert np.isfinite(integer_product(x, matrix)).all()
    assert integer_product(x, matrix).tobytes() == product_loop(x, matrix).tobytes()


def test_sums_beyond_24_bits_are_rounded_once() -> None:
    # The extremes of Q6_K: 256 times 127 times -32 times -128, and one that makes it odd.
    codes, multiplier = np.full((2, 256), -32, "i1"), np.full((2, 16), -128, "i1")
    codes[1, 0], multiplier[1, 0] = 31, 127
    matrix = IntegerMatrix(
        codes, np.ones((2, 1), "f4"), 256, multiplier, multiplier_size=16, activation_block=256
    )
    x = np.full((1, 256), 127, np.float32)
    sums = 127 * matrix.integers.astype(np.int64).sum(axis=1)
    assert sums.max() == 133169152
    assert sums[1] % 4 != 0
    assert np.array_equal(integer_product(x, matrix)[0], sums.astype(np.float32))
    assert integer_product(x, matrix).tobytes() == product_loop(x, matrix).tobytes()


def test_scales_of_weights_that_are_not_finite() -> None:
    matrix = IntegerMatrix(np.ones((3, 4), "i1"), np.float32([[np.inf], [np.nan], [3e38]]), 4)
    got = integer_product(np.float32([[1, 1, 1, 1], [0, 0, 0, 0]]), matrix)
    assert np.array_equal(got, [[np.inf, np.nan, np.inf], [np.nan, np.nan, 0]], equal_nan=True)


def test_rows_do_not_depend_on_the_others() -> None:
    rng = np.random.default_rng(1)
    matrix, _ = draw_encoded(rng, "GGUF q4_k", 9, 512)
    x = draw_rows(rng, 7, 512)
    whole = integer_product(x, matrix)
    for m in range(7):
        for n in range(0, 9, 4):
            members = matrix.codes[n : n + 1], matrix.scale[n : n + 1]
            row = IntegerMatrix(
                members[0],
                members[1],
                256,
                matrix.multiplier[n : n + 1],
                matrix.minimum[n : n + 1],
                matrix.minimum_multiplier[n : n + 1],
                32,
                activation_block=256,
            )
            assert integer_product(x[m : m + 1], row)[0, 0] == whole[m, n]


def test_no_rows_and_no_columns() -> None:
    matrix = IntegerMatrix(np.zeros((3, 0), "i1"), np.zeros((3, 0), "f4"), 32)
    assert np.array_equal(integer_product(np.zeros((2, 0), bf16).astype("f4"), matrix), np.zeros((2, 3)))
    matrix = IntegerMatrix(np.zeros((3, 5), "i1"), np.zeros((3, 1), "f4"), 32)
    assert integer_product(np.zeros((0, 5), np.float32), matrix).shape == (0, 3)


@pytest.mark.parametrize("shape", [(2, 4), (5,)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    matrix = IntegerMatrix(np.zeros((3, 5), "i1"), np.zeros((3, 1), "f4"), 32)
    with pytest.raises(ValueError, match=r"x: got shape .*, expected \[M, K\] for a matrix \[3, 5\]"):
        integer_product(np.zeros(shape, np.float32), matrix)
