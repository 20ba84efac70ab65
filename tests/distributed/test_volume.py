"""Expected exchange of ranks: against all possible tokens, and against drawn ones."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ktmoe_np.distributed.volume as volume
from ktmoe_np.distributed.volume import (
    PLACEMENTS,
    TokenVolume,
    expert_counts,
    hit_chances,
    mean_volume,
    token_volume,
)


def test_doctests() -> None:
    assert doctest.testmod(volume).failed == 0


def owners(counts: tuple[int, ...]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def exchanged(owner: np.ndarray, experts: np.ndarray, home: int, hidden: int) -> np.ndarray:
    """Ranks, slots, bytes out, bytes back exact and fast of tokens with these experts [T, P], counted."""
    rows = []
    for token in experts:
        remote = [int(rank) for rank in owner[token] if rank != home]
        messages = {rank: remote.count(rank) for rank in remote}
        out = len(messages) * (2 * hidden + 4 * len(token))
        back = sum(4 * hidden * slots for slots in messages.values()), 4 * hidden * len(messages)
        rows.append((len(messages), len(remote), out, *back))
    return np.array(rows, float)


def values(found: TokenVolume) -> np.ndarray:
    return np.array([found.ranks, found.slots, found.sent_bytes, found.exact_bytes, found.fast_bytes])


@given(st.integers(1, 300), st.integers(1, 40))
def test_counts_are_those_of_the_placements(num_experts: int, num_ranks: int) -> None:
    for placement in PLACEMENTS:
        counts = expert_counts(num_experts, num_ranks, placement)
        assert (len(counts), sum(counts)) == (num_ranks, num_experts)
        assert max(counts) - min(counts) <= 1
        if placement == "strided":
            owner = np.arange(num_experts) % num_ranks
            assert np.array_equal(np.bincount(owner, minlength=num_ranks), counts)
        else:
            assert counts == tuple(sorted(counts, reverse=True))


@pytest.mark.parametrize("counts", [(2, 2, 2), (3, 3, 1), (0, 5, 1), (6,), (1,) * 6])
def test_every_set_of_experts_counted(counts: tuple[int, ...]) -> None:
    total = sum(counts)
    for num_experts_per_tok in range(1, total + 1):
        sets = np.array(list(itertools.combinations(range(total), num_experts_per_tok)))
        means = []
        for home in range(len(counts)):
            mean = exchanged(owners(counts), sets, home, 64).mean(axis=0)
            means.append(mean)
            np.testing.assert_allclose(values(token_volume(counts, home, num_experts_per_tok, 64)), mean)
        np.testing.assert_allclose(
            values(mean_volume(counts, num_experts_per_tok, 64)), np.mean(means, axis=0)
        )


def test_drawn_tokens_of_a_large_layer() -> None:
    counts, num_tokens = expert_counts(130, 8), 4000
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((num_tokens, 130)), axis=1)[:, :8]
    drawn = exchanged(owners(counts), experts, 3, 2048)
    error = drawn.std(axis=0) / num_tokens**0.5
    assert np.all(np.abs(drawn.mean(axis=0) - values(token_volume(counts, 3, 8, 2048))) < 5 * error)


def test_one_rank_exchanges_nothing() -> None:
    assert not values(mean_volume([16], 4, 64)).any()


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: expert_counts(0, 2), ValueError, "num_experts: got 0, expected at least 1"),
        (lambda: expert_counts(4, 0), ValueError, "num_ranks: got 0, expected at least 1"),
        (lambda: expert_counts(4, 2, "x"), ValueError, "placement: got 'x', expected contiguous or strided"),
        (lambda: hit_chances([3, -1], 1), ValueError, r"counts\[1\]: got -1, expected at least 0"),
        (lambda: hit_chances([2, 1], 4), ValueError, "num_experts_per_tok: got 4, expected 1 to 3"),
        (lambda: hit_chances([2, 1], 0), ValueError, "num_experts_per_tok: got 0, expected 1 to 3"),
        (lambda: token_volume([2, 1], 2, 1, 8), IndexError, "home: got 2, expected 0 to 1"),
        (lambda: token_volume([2, 1], 0, 1, 0), ValueError, "hidden_size: got 0, expected at least 1"),
        (lambda: mean_volume([2, 1], 1, 0), ValueError, "hidden_size: got 0, expected at least 1"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=f"^{said}"):
        call()
