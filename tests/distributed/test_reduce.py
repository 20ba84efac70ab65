"""Sums over replicas: in the order of ranks, to the bit, and refused where ranks differ."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import AnyArray, assert_same_bits
from ranks import on_ranks

import ktmoe_np.distributed.reduce
from ktmoe_np.distributed import RankError, reduce_gradients


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.distributed.reduce).failed == 0


@given(st.data(), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_order_of_ranks(data: st.DataObject, num_ranks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), max_size=4))
    given = [
        {f"x{i}": (1e3 ** rng.standard_normal(shape)).astype(np.float32) for i, shape in enumerate(shapes)}
        for _ in range(num_ranks)
    ]
    expected = {name: value.copy() for name, value in given[0].items()}
    for other in given[1:]:
        for name, value in other.items():
            expected[name] += value

    def rank(comm: Any) -> dict[str, AnyArray]:
        reduce_gradients(given[comm.rank], comm)
        return given[comm.rank]

    for found in on_ranks(num_ranks, rank):
        for name, value in expected.items():
            assert_same_bits(found[name], value, name)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"x": np.ones(3, np.float64)}, "rank 1: TypeError: x: got float64, expected float32"),
        (
            {"x": np.ones(2, np.float32)},
            "gradients: got {'x': (2,)} on rank 1, expected {'x': (3,)} as on rank 0",
        ),
        ({"y": np.ones(3, np.float32)}, "gradients: got {'y': (3,)} on rank 1"),
    ],
    ids=str,
)
def test_ranks_that_differ(second: dict[str, AnyArray], message: str) -> None:
    def rank(comm: Any) -> str:
        mine = second if comm.rank else {"x": np.ones(3, np.float32)}
        with pytest.raises(RankError) as found:
            reduce_gradients(mine, comm)
        assert all((value == 1).all() for value in mine.values())
        reduce_gradients({"x": np.ones(1, np.float32)}, comm)
        return str(found.value)

    for said in on_ranks(2, rank):
        assert said.startswith(message)
