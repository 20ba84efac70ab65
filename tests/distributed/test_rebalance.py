"""Experts that move to other ranks: results stay, and the work is spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import AnyArray, Batch, assert_same_bits, draw
from ranks import on_ranks

from ktmoe_np import KTMoEWrapper
from ktmoe_np.cli import main
from ktmoe_np.distributed import ExpertParallel, RankError, balanced_owners
from ktmoe_np.models import EMBEDDED_MODEL

E, P, H = 16, 4, 256  # of the embedded model


@given(st.integers(1, 6), st.lists(st.integers(0, 1000), min_size=6, max_size=40))
def test_balanced_owners(num_ranks: int, tokens: list[int]) -> None:
    owners = balanced_owners(tokens, num_ranks)
    counts = np.bincount(owners, minlength=num_ranks)
    assert counts.max() - counts.min() <= 1
    load = np.bincount(owners, weights=tokens, minlength=num_ranks)
    assert load.max() <= np.sum(tokens) / num_ranks + np.max(tokens)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([1, 2], ValueError, r"expert_tokens: got shape \[2\], expected \[E\], at least 3"),
        ([[1, 2, 3]], ValueError, r"expert_tokens: got shape \[1, 3\]"),
        ([0.5, 1, 2], TypeError, "expert_tokens: got float64"),
    ],
)
def test_what_is_no_histogram(tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        balanced_owners(tokens, 3)


def batches() -> list[Batch]:
    """Tokens that all want the experts of the first rank."""
    rng = np.random.default_rng(0)
    return [
        Batch(draw(rng, size, H), rng.integers(0, 8, (size, P)), rng.random((size, P), np.float32))
        for size in (9, 4)
    ]


@pytest.mark.parametrize("converted", [False, True])
def test_by_what_was_counted(converted: bool, tmp_path: Path) -> None:
    path = EMBEDDED_MODEL
    if converted:
        path = tmp_path / "converted"
        assert main(["convert", str(EMBEDDED_MODEL), str(path), "--method=AMXINT8"]) == 0
    given, whole = batches(), KTMoEWrapper.from_pretrained(path, 1)

    def rank(comm: Any) -> tuple[list[AnyArray], AnyArray, list[int], list[int]]:
        moe = ExpertParallel.from_pretrained(path, 1, comm=comm, timeout=30)
        moe.layer.collect_stats()
        found = [moe.forward(*given[comm.rank])]
        before = int(moe.layer.stats().rows)
        moe.rebalance()
        found.append(moe.forward(*given[comm.rank]))
        after = int(moe.layer.stats().rows)
        moe.rebalance(np.arange(E))
        found.append(moe.forward(*given[comm.rank]))
        return found, moe.placement.owners, [before, after], moe.experts.tolist()

    results = on_ranks(2, rank)
    for batch, (found, owners, _, experts) in zip(given, results, strict=True):
        for got in found:
            assert_same_bits(got, whole.forward(*batch))
        assert np.bincount(owners).tolist() == [8, 8]
        assert len(experts) == 8
    rows = np.array([counted for _, _, counted, _ in results])
    assert rows[:, 0].tolist() == [13 * P, 0]  # all on one rank
    assert rows[:, 1].max() < 0.75 * rows[:, 1].sum()
    assert sorted(results[0][3] + results[1][3]) == list(range(E))


def test_what_cannot_be_placed_anew() -> None:
    def caught(function: Any) -> str:
        with pytest.raises(RankError) as found:
            function()
        return str(found.value)

    def rank(comm: Any) -> list[str]:
        moe = ExpertParallel.from_pretrained(EMBEDDED_MODEL, 1, comm=comm, timeout=30)
        owners = moe.placement.owners
        quantized = ExpertParallel.from_pretrained(EMBEDDED_MODEL, 1, "AMXINT8", comm=comm)
        said = [
            caught(moe.rebalance),
            caught(lambda: moe.rebalance(np.ones(E + comm.rank, int))),
            caught(lambda: quantized.rebalance(np.ones(E, int))),
            caught(lambda: ExpertParallel(moe.layer, comm).rebalance(np.ones(E, int))),
        ]
        assert moe.placement.owners is owners
        return said

    for said in on_ranks(2, rank):
        assert "RuntimeError: stats: " in said[0]
        assert said[1] == "rank 1: ValueError: expert_tokens: got shape [17], expected [16]"
        assert "rebalance: got method 'AMXINT8' that quantizes at load, expected a directory of" in said[2]
        assert "rebalance: got a layer made of another, expected one of from_pretrained" in said[3]
