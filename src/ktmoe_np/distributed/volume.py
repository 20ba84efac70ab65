"""What ranks that share the experts of a layer hold and exchange, as expected values: pure arithmetic.

A token's P experts are different ones, each set as likely as any other. A token goes once to every other
rank that has one of its experts: H numbers in bfloat16, and an id of four bytes for each of its P slots
(with ``fast`` also a weight, which is not counted here). Back come float32 rows of H: one for each slot
whose expert is there (``exact``), or one from each rank (``fast``). What a rank computes for its own tokens
is not sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb

__all__ = ["PLACEMENTS", "TokenVolume", "expert_counts", "hit_chances", "mean_volume", "token_volume"]

#: The placements that have a name.
PLACEMENTS = ("contiguous", "strided")

#: Bytes of a value of a row on its way out and back, and of the id of a slot.
_OUT_BYTES, _BACK_BYTES, _ID_BYTES = 2, 4, 4


@dataclass(frozen=True)
class TokenVolume:
    """What one token exchanges in one layer with other ranks than its own, as expected values.

    Parameters
    ----------
    ranks : float
        Ranks that it goes to.
    slots : float
        Slots whose experts are there.
    sent_bytes : float
        Bytes that go out.
    exact_bytes, fast_bytes : float
        Bytes that come back with ``combine="exact"`` and ``"fast"``.
    """

    ranks: float
    slots: float
    sent_bytes: float
    exact_bytes: float
    fast_bytes: float


def expert_counts(num_experts: int, num_ranks: int, placement: str = "contiguous") -> tuple[int, ...]:
    """Count the experts that each rank has.

    Parameters
    ----------
    num_experts : int
        E.
    num_ranks : int
        N.
    placement : str
        ``contiguous``: ranks have neighbors, in order, the first E mod N of them one more. ``strided``:
        expert e belongs to rank e mod N. Their counts are the same.

    Raises
    ------
    ValueError
        Another placement, or a number below 1.

    Examples
    --------
    >>> expert_counts(10, 4), expert_counts(10, 4, "strided")
    ((3, 3, 2, 2), (3, 3, 2, 2))
    """
    _check_at_least("num_experts", num_experts, 1)
    _check_at_least("num_ranks", num_ranks, 1)
    if placement == "contiguous":
        each, more = divmod(num_experts, num_ranks)
        return tuple(each + (rank < more) for rank in range(num_ranks))
    if placement == "strided":
        return tuple(len(range(rank, num_experts, num_ranks)) for rank in range(num_ranks))
    raise ValueError(f"placement: got {placement!r}, expected {' or '.join(PLACEMENTS)}")


def hit_chances(counts: Sequence[int], num_experts_per_tok: int) -> tuple[Fraction, ...]:
    """The chance of each rank that a token has one of its experts or more, 1 - C(E - E_r, P) / C(E, P).

    Parameters
    ----------
    counts : sequence of int
        Experts of each rank, E in all.
    num_experts_per_tok : int
        P, at most E.

    Raises
    ------
    ValueError
        A negative count, or a P outside 1 to E.

    Examples
    --------
    >>> hit_chances([2, 1, 1], 2)
    (Fraction(5, 6), Fraction(1, 2), Fraction(1, 2))
    """
    for rank, count in enumerate(counts):
        _check_at_least(f"counts[{rank}]", count, 0)
    total = sum(counts)
    if not 1 <= num_experts_per_tok <= total:
        raise ValueError(f"num_experts_per_tok: got {num_experts_per_tok}, expected 1 to {total}")
    ways = comb(total, num_experts_per_tok)
    return tuple(1 - Fraction(comb(total - count, num_experts_per_tok), ways) for count in counts)


def token_volume(counts: Sequence[int], home: int, num_experts_per_tok: int, hidden_size: int) -> TokenVolume:
    """Tell what a token of a rank exchanges in one layer.

    Parameters
    ----------
    counts : sequence of int
        Experts of each rank.
    home : int
        The token's rank.
    num_experts_per_tok : int
        P.
    hidden_size : int
        H.

    Raises
    ------
    ValueError
        See `hit_chances`; or a `hidden_size` below 1.
    IndexError
        A `home` that is none of the ranks.

    Examples
    --------
    >>> token_volume([2, 2], home=0, num_experts_per_tok=1, hidden_size=64)
    TokenVolume(ranks=0.5, slots=0.5, sent_bytes=66.0, exact_bytes=128.0, fast_bytes=128.0)
    """
    _check_at_least("hidden_size", hidden_size, 1)
    if not 0 <= home < len(counts):
        raise IndexError(f"home: got {home}, expected 0 to {len(counts) - 1}")
    chances = hit_chances(counts, num_experts_per_tok)
    ranks = sum(chances) - chances[home]
    slots = Fraction(num_experts_per_tok * (sum(counts) - counts[home]), sum(counts))
    return _volume(ranks, slots, num_experts_per_tok, hidden_size)


def mean_volume(counts: Sequence[int], num_experts_per_tok: int, hidden_size: int) -> TokenVolume:
    """Tell what a token exchanges in one layer when all ranks have as many tokens; see `token_volume`.

    Examples
    --------
    >>> mean_volume([64] * 4, num_experts_per_tok=1, hidden_size=64).ranks
    0.75
    """
    _check_at_least("hidden_size", hidden_size, 1)
    chances, elsewhere = hit_chances(counts, num_experts_per_tok), Fraction(len(counts) - 1, len(counts))
    slots = num_experts_per_tok * elsewhere
    return _volume(sum(chances) * elsewhere, slots, num_experts_per_tok, hidden_size)


def _volume(ranks: Fraction, slots: Fraction, num_experts_per_tok: int, hidden_size: int) -> TokenVolume:
    row = _BACK_BYTES * hidden_size
    sent = ranks * (_OUT_BYTES * hidden_size + _ID_BYTES * num_experts_per_tok)
    return TokenVolume(float(ranks), float(slots), float(sent), float(slots * row), float(ranks * row))


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
