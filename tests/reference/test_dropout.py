"""The generator against its published answers, and the masks against one element at a time."""

from __future__ import annotations

import doctest
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_cases import philox_word

import ktmoe_np.reference.dropout
from ktmoe_np.reference import Dropout, dropout_mask, philox4x32

CASE: dict[str, Any] = {
    "seed": 1, "step": 2, "layer": 3, "tokens": 5, "features": 9, "which": "x", "rate": 0.5
}  # fmt: skip


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.reference.dropout).failed == 0


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, words: str) -> None:
    c, k, expected = (
        np.array([int(word, 16) for word in text.split()], np.uint32) for text in (counter, key, words)
    )
    assert np.array_equal(philox4x32(c, k), expected)
    many = philox4x32(np.tile(c, (3, 2, 1)), k)
    assert many.dtype == np.uint32
    assert np.array_equal(many, np.tile(expected, (3, 2, 1)))


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**31 - 1),
    st.integers(0, 6),
    st.integers(0, 11),
    st.sampled_from(["x", "h"]),
    st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None, max_examples=100)
def test_every_element_can_be_drawn_alone(
    seed: int, step: int, layer: int, tokens: int, features: int, which: str, rate: float
) -> None:
    mask = dropout_mask(seed, step, layer, tokens, features, which, rate)
    assert mask.shape == (tokens, features)
    assert mask.dtype == np.bool_
    for t in range(tokens):
        for f in range(features):
            word = philox_word(seed, step, layer, t, f, "xh".index(which))
            assert mask[t, f] == (word >= math.floor(rate * 2**32))


@pytest.mark.parametrize("change", ["seed", "step", "layer", "which"])
def test_every_part_of_the_key_counts(change: str) -> None:
    case = {**CASE, "tokens": 64, "features": 64}
    other = {**case, change: "h" if change == "which" else case[change] + 1}
    agree = np.mean(dropout_mask(**case) == dropout_mask(**other))
    assert abs(agree - 0.5) < 6 * 0.5 / 64


def test_a_seed_has_64_bits() -> None:
    case = {**CASE, "tokens": 64, "features": 64}
    agree = np.mean(dropout_mask(**case) == dropout_mask(**{**case, "seed": 1 + 2**32}))
    assert abs(agree - 0.5) < 6 * 0.5 / 64


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.9])
def test_the_rate_is_the_share_that_is_dropped(rate: float) -> None:
    mask = dropout_mask(**{**CASE, "tokens": 300, "features": 401, "rate": rate})
    tolerance = 6 * math.sqrt(rate * (1 - rate) / mask.size)
    assert abs(mask.mean() - (1 - rate)) <= tolerance
    assert np.abs(mask.mean(axis=0) - (1 - rate)).max() <= tolerance * math.sqrt(401)
    assert np.abs(mask.mean(axis=1) - (1 - rate)).max() <= tolerance * math.sqrt(300)


def test_the_comparison_is_to_the_last_bit() -> None:
    word = philox_word(seed=1, step=2, layer=3, token=4, feature=7, which=0)
    for threshold, kept in ((word - 1, True), (word, True), (word + 0.999, True), (word + 1, False)):
        assert dropout_mask(**{**CASE, "rate": threshold / 2**32})[4, 7] == kept


def test_a_larger_mask_begins_with_the_smaller() -> None:
    large = dropout_mask(**{**CASE, "tokens": 20, "features": 31})
    assert np.array_equal(large[:5, :9], dropout_mask(**CASE))


def test_the_largest_rate_keeps_only_the_largest_word() -> None:
    assert not dropout_mask(**{**CASE, "rate": math.nextafter(1.0, 0.0)}).any()


def test_dropout_draws_the_mask_of_its_parts() -> None:
    dropout = Dropout(0.5, seed=1, step=2, layer=3)
    assert np.array_equal(dropout.mask(5, 9, "x"), dropout_mask(**CASE))
    assert not np.array_equal(dropout.mask(5, 9, "h"), dropout_mask(**CASE))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ValueError, f"seed: got -1, expected 0 to {2**64 - 1}"),
        ({"seed": 2**64}, ValueError, f"seed: got {2**64}, expected 0 to {2**64 - 1}"),
        ({"seed": 1.0}, TypeError, "seed: got 1.0, expected an integer"),
        ({"step": 2**32}, ValueError, f"step: got {2**32}, expected 0 to {2**32 - 1}"),
        ({"step": True}, TypeError, "step: got True, expected an integer"),
        ({"layer": 2**31}, ValueError, f"layer: got {2**31}, expected 0 to {2**31 - 1}"),
        ({"tokens": -1}, ValueError, f"tokens: got -1, expected 0 to {2**32}"),
        ({"features": "9"}, TypeError, "features: got '9', expected an integer"),
        ({"which": "y"}, ValueError, "which: got 'y', expected 'x' or 'h'"),
        ({"rate": 1.0}, ValueError, "rate: got 1.0, expected at least 0 and below 1"),
        ({"rate": -0.1}, ValueError, "rate: got -0.1, expected at least 0 and below 1"),
        ({"rate": math.nan}, ValueError, "rate: got nan, expected at least 0 and below 1"),
        ({"rate": "0.1"}, TypeError, "rate: got '0.1', expected a number"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dropout_mask(**{**CASE, **change})


def test_a_wrong_rate_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"rate: got 2\.0, expected at least 0 and below 1"):
        Dropout(2.0)
