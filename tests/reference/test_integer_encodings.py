"""Encodings as integers: they are the weights that are decoded from the same bytes."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
from gguf_blocks import GGUF_BLOCKS, draw_blocks
from integer_cases import ENCODINGS, draw_encoded

import ktmoe_np.reference.integer_encodings
import ktmoe_np.reference.integer_matrix
from ktmoe_np.reference import (
    IntegerMatrix,
    ScaledMatrix,
    decode_gguf,
    dequantize,
    integers_of_gguf,
    integers_of_gptq_int4,
    integers_of_quantized,
    quantize_int8,
    round_bf16,
)
from ktmoe_np.reference.gguf import BLOCK_TYPES

encodings = pytest.mark.parametrize("name", sorted(ENCODINGS))


def test_doctests() -> None:
    for module in (ktmoe_np.reference.integer_encodings, ktmoe_np.reference.integer_matrix):
        assert doctest.testmod(module).failed == 0


@encodings
@pytest.mark.parametrize("seed", range(3))
def test_they_are_the_decoded_weights(name: str, seed: int) -> None:
    matrix, decoded = draw_encoded(np.random.default_rng(seed), name, 2, 5, 512)
    assert matrix.shape == decoded.shape
    if isinstance(decoded, ScaledMatrix):
        assert np.array_equal(matrix.channel_scale, decoded.channel_scale)
        decoded = decoded.codes
    else:
        assert matrix.channel_scale is None
    assert np.array_equal(matrix.product_weights(), decoded)
    exact, rounded = matrix.values(np.float64), matrix.values()
    assert rounded.dtype == np.float32
    assert np.array_equal(exact.astype(np.float32), rounded)
    assert np.array_equal(round_bf16(exact), decoded.astype(np.float64))


@encodings
def test_values_are_the_formula(name: str) -> None:
    matrix, _ = draw_encoded(np.random.default_rng(3), name, 4, 512)
    for n, k in ((0, 0), (1, 31), (2, 255), (3, 256), (0, 511)):
        at, group = (n, k // matrix.multiplier_size), (n, k // matrix.group_size)
        integer = int(matrix.codes[n, k]) * (1 if matrix.multiplier is None else int(matrix.multiplier[at]))
        assert matrix.integers[n, k] == integer
        weight = float(matrix.scale[group]) * integer
        if matrix.minimum is not None:
            least = 1 if matrix.minimum_multiplier is None else int(matrix.minimum_multiplier[at])
            assert matrix.minimum_integers[n, k] == least
            weight -= float(matrix.minimum[group]) * least
        assert matrix.values(np.float64)[n, k] == weight


@pytest.mark.parametrize("name", sorted(GGUF_BLOCKS))
def test_any_bytes_of_gguf(name: str) -> None:
    # Scales may be infinite or NaN, and so are weights then.
    rows = np.random.default_rng(5).integers(0, 256, (40, 2 * GGUF_BLOCKS[name].block_bytes), np.uint8)
    found = integers_of_gguf(rows, name).product_weights().astype(np.float32)
    assert np.array_equal(found, decode_gguf(rows, name).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("name", sorted(GGUF_BLOCKS))
def test_groups_and_blocks_of_gguf(name: str) -> None:
    matrix = integers_of_gguf(
        np.zeros((1, 512 // GGUF_BLOCKS[name].block * GGUF_BLOCKS[name].block_bytes), "u1"), name
    )
    whole = GGUF_BLOCKS[name].block == 256
    assert matrix.activation_block == (256 if whole else 128)
    assert matrix.group_size == {"nvfp4": 16}.get(name, GGUF_BLOCKS[name].block)
    assert (matrix.multiplier is not None) == (whole and name not in ("tq1_0", "tq2_0"))
    assert (matrix.minimum is not None) == (name in ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k"))


def test_all_types_of_blocks_are_there() -> None:
    assert set(BLOCK_TYPES) == set(GGUF_BLOCKS)


def test_extreme_numbers_of_gguf() -> None:
    block = np.zeros((1, 34), np.uint8)
    block[0, 2] = 128
    assert integers_of_gguf(block, "q8_0").codes[0, 0] == -128
    block = np.zeros((1, 110), np.uint8)  # of q3_k: -4 times -32
    assert integers_of_gguf(block, "q3_k").integers.max() == 128


@pytest.mark.parametrize("name", sorted(GGUF_BLOCKS))
def test_the_last_block_in_part(name: str) -> None:
    found = GGUF_BLOCKS[name]
    rows = draw_blocks(np.random.default_rng(1), name, np.ones((3, 2))).reshape(3, -1)
    whole = integers_of_gguf(rows, name)
    for count in (found.block + 1, 2 * found.block - 1, 2 * found.block):
        part = integers_of_gguf(rows, name, count)
        assert np.array_equal(part.values(), whole.values()[:, :count])


def test_groups_of_gptq_become_those_of_32() -> None:
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(-(2**31), 2**31, (32, 3), np.int32), rng.random((2, 3)).astype(np.float16)
    matrix = integers_of_gptq_int4(codes, scales)
    assert matrix.group_size == 32
    assert np.array_equal(matrix.scale, np.repeat(scales.T, 4, axis=1).astype(np.float32))


def test_quantized_rows_without_columns() -> None:
    matrix = integers_of_quantized(quantize_int8(np.zeros((3, 0), np.float32)))
    assert (matrix.shape, matrix.scale.shape) == ((3, 0), (3, 0))


def test_quantized_matrices_keep_their_scales() -> None:
    quantized = quantize_int8(np.random.default_rng(0).standard_normal((2, 3, 70), np.float32))
    matrix = integers_of_quantized(quantized)
    assert np.array_equal(matrix.values(), dequantize(quantized))
    assert np.array_equal(matrix[1].values(), dequantize(quantized[1]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"group_size": 0}, ValueError, "group_size: got 0, expected at least 1"),
        ({"activation_block": 0}, ValueError, "activation_block: got 0, expected at least 1"),
        ({"codes": np.zeros((2, 5))}, TypeError, "codes: got float64, expected int8"),
        ({"scale": np.zeros((2, 2), "f4")}, ValueError, r"scale: got shape \[2, 2\], expected \[2, 3\]"),
        ({"multiplier": np.zeros((2, 2), "i1")}, ValueError, r"multiplier: got shape \[2, 2\]"),
        ({"minimum": np.zeros((2, 3))}, TypeError, "minimum: got float64, expected float32"),
        (
            {"minimum_multiplier": np.zeros((2, 5), "i1")},
            ValueError,
            "minimum: got None, expected an array beside minimum_multiplier",
        ),
        ({"channel_scale": np.zeros((3,), "f4")}, ValueError, r"channel_scale: got shape \[3\]"),
    ],
)
def test_wrong_members(change: dict[str, Any], error: type[Exception], message: str) -> None:
    members: dict[str, Any] = {"codes": np.zeros((2, 5), "i1"), "scale": np.zeros((2, 3), "f4")}
    with pytest.raises(error, match=message):
        IntegerMatrix(**{**members, "group_size": 2, **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((1, 18), "u1"), "bf16"), "type_name: got 'bf16', expected one of q4_0, "),
        ((np.zeros((1, 17), "u1"), "q4_0"), "data: got rows of 17 bytes, expected a multiple of 18 of q4_0"),
        ((np.zeros((1, 36), "u1"), "q4_0", 32), "num_columns: got 32, expected one that 64 values"),
        ((np.zeros((1, 36), "u1"), "q4_0", 65), "num_columns: got 65, expected one that 64 values"),
    ],
)
def test_wrong_rows(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        integers_of_gguf(*arguments)
