"""Which rank has which experts: the placements that have a name, and those that are refused."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ktmoe_np.distributed.placement
from ktmoe_np.distributed.placement import owners_of


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.distributed.placement).failed == 0


@pytest.mark.parametrize(
    ("placement", "error", "message"),
    [
        ("diagonal", ValueError, "placement: got 'diagonal', expected 'contiguous', 'strided' or the rank"),
        ([0, 1], ValueError, r"placement: got shape \[2\], expected \[3\]"),
        ([0, 1, 2], IndexError, "placement: got rank 2 for expert 2, expected 0 to 1"),
        ([0, 1, -1], IndexError, "placement: got rank -1 for expert 2, expected 0 to 1"),
        (
            [0, 0, 0],
            ValueError,
            "placement: got no expert for rank 1 of 2, expected one at least: the layer has 3",
        ),
        ([0.5, 0, 1], TypeError, "placement: got float64"),
    ],
)
def test_wrong_placements(placement: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        owners_of(placement, 3, 2)


@given(st.integers(1, 40), st.integers(1, 40))
def test_named_placements(first: int, second: int) -> None:
    num_ranks, num_experts = sorted((first, second))
    for name in ("contiguous", "strided"):
        owners = owners_of(name, num_experts, num_ranks)  # type: ignore[arg-type]
        counts = np.bincount(owners, minlength=num_ranks)
        assert counts.max() - counts.min() <= 1
        assert (np.diff(owners) >= 0).all() or name == "strided"
