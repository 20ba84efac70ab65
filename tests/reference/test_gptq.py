"""Rows that GPTQ's matrices are converted to: the reference's weights, and what the block format says."""

from __future__ import annotations

import doctest
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ktmoe_np.formats.gptq
import ktmoe_np.reference.native
from ktmoe_np.formats.encodings import NATIVE_FORMATS
from ktmoe_np.formats.gptq import first_not_float16, group_sizes, q4_0_rows
from ktmoe_np.reference import decode_gptq_int4, round_bf16

BF16 = ml_dtypes.bfloat16

seeds = st.integers(0, 2**32 - 1)
#: K is up to 1,024; a group size of 0 is all of K.
columns, groups = st.integers(1, 32).map(lambda blocks: 32 * blocks), st.sampled_from([0, 32, 64, 128, 256])


def draw_matrices(seed: int, num_rows: int, num_columns: int, group_size: int) -> tuple[Any, Any]:
    """Two experts of any codes, with scales of any size, 0 and both signs."""
    rng = np.random.default_rng(seed)
    num_groups = -(-num_columns // (group_size or num_columns))
    qweight = rng.integers(-(2**31), 2**31, (2, num_columns // 8, num_rows), np.int32)
    scale = rng.integers(0, 2**16, (2, num_groups, num_rows), np.uint16).view(np.float16)
    return qweight, np.where(np.isfinite(scale), scale, np.float16(0))


def decoded(rows: Any) -> Any:
    """Each weight by the definition of a block."""
    blocks = rows.reshape(*rows.shape[:-1], -1, 18)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    return (scale * (codes.astype(np.float32) - 8)).reshape(*rows.shape[:-1], -1)


def test_doctests() -> None:
    for module in (ktmoe_np.formats.gptq, ktmoe_np.reference.native):
        assert doctest.testmod(module).failed == 0


@settings(deadline=None)
@given(seeds, st.integers(1, 50), columns, groups)
def test_rows_are_the_weights_of_the_reference(seed: int, num_rows: int, num_columns: int, size: int) -> None:
    qweight, scale = draw_matrices(seed, num_rows, num_columns, size)
    rows = q4_0_rows(qweight, scale)
    assert rows.shape == (2, num_rows, num_columns // 32 * 18)
    assert rows.flags.c_contiguous
    expected = decode_gptq_int4(qweight, scale)
    assert expected.shape == (2, num_rows, num_columns)
    assert np.array_equal(round_bf16(decoded(rows)), expected.astype(np.float32))


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 20), columns, groups)
def test_the_reference_is_the_definition(seed: int, num_rows: int, num_columns: int, size: int) -> None:
    qweight, scale = draw_matrices(seed, num_rows, num_columns, size)
    weights = decode_gptq_int4(qweight[1], scale[1])
    rng = np.random.default_rng(seed)
    for n, k in zip(rng.integers(0, num_rows, 40), rng.integers(0, num_columns, 40), strict=True):
        nibble = int(qweight[1, k // 8, n]) >> 4 * int(k % 8) & 15
        product = np.float32(nibble - 8) * np.float32(scale[1, k // (size or num_columns), n])
        assert weights[n, k] == product.astype(BF16)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 20), columns, groups)
def test_arrays_may_lie_anyhow(seed: int, num_rows: int, num_columns: int, size: int) -> None:
    qweight, scale = draw_matrices(seed, num_rows, num_columns, size)
    rows = q4_0_rows(qweight, scale)
    apart = np.repeat(qweight, 2, axis=-1)[..., ::2], np.asfortranarray(scale)
    assert np.array_equal(q4_0_rows(*apart), rows)
    odd = np.zeros(qweight[0].nbytes + 1, np.uint8)
    moved = odd[1:].view(np.int32).reshape(qweight[0].shape)
    moved[...] = qweight[0]
    moved.flags.writeable = False
    assert np.array_equal(q4_0_rows([moved, qweight[1]], list(scale)), rows)


def test_experts_may_have_groups_of_their_own() -> None:
    (first, _), (fine, coarse) = draw_matrices(0, 8, 128, 32), (32, 128)
    scales = [draw_matrices(1, 8, 128, size)[1][0] for size in (fine, coarse)]
    rows = q4_0_rows(first, scales)
    for e in range(2):
        expected = decode_gptq_int4(first[e], scales[e]).astype(np.float32)
        assert np.array_equal(round_bf16(decoded(rows[e])), expected)


@given(st.integers(1, 10**6))
def test_the_number_of_groups_tells_their_size(num_columns: int) -> None:
    sizes = group_sizes(num_columns)
    assert sizes[1] == num_columns
    powers = [2**bit for bit in range(5, 20) if 2**bit < num_columns]
    assert {size for count, size in sizes.items() if count > 1} == set(powers)
    for count, size in sizes.items():
        assert count == -(-num_columns // size)


@given(st.integers(0, 2**16 - 1))
def test_numbers_that_float16_has(bits: int) -> None:
    number = np.array([1, bits], np.uint16)[1:].view(BF16)
    value = float(number[0])
    exact = np.isnan(value) or np.isinf(value) or ((value * 2**24).is_integer() and abs(value) < 2**16)
    assert (first_not_float16(number) is None) == exact
    assert first_not_float16(number.view(np.float16)) is None


def test_the_first_of_them_is_told() -> None:
    scale = np.array([[1, 2.0**-25], [np.nan, 2.0**17]], BF16)
    assert first_not_float16(scale) == 2.0**-25
    assert first_not_float16(scale[:, :1]) is None
    assert first_not_float16(scale[:0]) is None


def test_bfloat16_scales_are_the_same_rows() -> None:
    qweight, _ = draw_matrices(2, 16, 96, 32)
    scale = np.random.default_rng(2).uniform(0.01, 1, (2, 3, 16)).astype(BF16)
    rows = q4_0_rows(qweight, scale)
    assert np.array_equal(rows, q4_0_rows(qweight, scale.astype(np.float16)))
    assert np.array_equal(round_bf16(decoded(rows)), decode_gptq_int4(qweight, scale).astype(np.float32))


@pytest.mark.parametrize("num_columns", [1, 16, 40, 100])
def test_columns_that_are_no_blocks_are_refused(num_columns: int) -> None:
    got = f"got {num_columns} columns"
    message = f"down_proj: {got}, expected a multiple of 32 with gptq_int4"
    codes, scale = np.zeros((2, 5, 8), np.int32), np.ones((2, 1, 8), np.float16)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        NATIVE_FORMATS["gptq_int4"].matrices("down", codes, scale, None, (2, 8, num_columns))
