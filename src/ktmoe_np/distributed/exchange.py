"""Which tokens go to which rank, and where what comes back belongs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .placement import Placement

__all__ = ["SentTokens", "route_tokens"]


@dataclass(frozen=True, eq=False)
class SentTokens:
    """The tokens of a batch that each rank gets: those with a slot whose expert it has, each once.

    Parameters
    ----------
    num_tokens : array of int64 [N]
        Tokens for each rank.
    num_rows : array of int64 [N]
        Slots that each rank computes: rows that come back.
    tokens : array of int64 [M]
        The tokens, by rank, ascending within a rank.
    ids : array of int32 [M, P]
        The numbers of their experts on that rank; -1 where the expert is another's, or none.
    """

    num_tokens: NDArray[np.int64]
    num_rows: NDArray[np.int64]
    tokens: NDArray[np.int64]
    ids: NDArray[np.int32]

    def block(self, rank: int) -> slice:
        """The tokens of a rank among all."""
        begin = int(self.num_tokens[:rank].sum())
        return slice(begin, begin + int(self.num_tokens[rank]))

    def row_of_slots(self, batch: int, first_row: NDArray[np.int64]) -> NDArray[np.int32]:
        """Where the row of each slot of the batch is, when rank r returns its rows from first_row[r] on.

        Parameters
        ----------
        batch : int
            T, the tokens of the batch.
        first_row : array of int64 [N]

        Returns
        -------
        array of int32 [T, P]
            -1 for slots that no rank computes.
        """
        valid = self.ids >= 0
        ends = np.cumsum(self.num_rows)
        shift = np.repeat(first_row - (ends - self.num_rows), self.num_rows)
        at, slot = np.nonzero(valid)
        rows = np.full((batch, self.ids.shape[1]), -1, np.int32)
        rows[self.tokens[at], slot] = np.arange(len(at)) + shift
        return rows

    def row_of_ranks(self, batch: int, first_row: NDArray[np.int64]) -> NDArray[np.int32]:
        """Where each rank's row of each token is, [T, N], when ranks return one row per token of theirs."""
        ranks = np.repeat(np.arange(len(self.num_tokens)), self.num_tokens)
        ends = np.cumsum(self.num_tokens)
        shift = np.repeat(first_row - (ends - self.num_tokens), self.num_tokens)
        rows = np.full((batch, len(self.num_tokens)), -1, np.int32)
        rows[self.tokens, ranks] = np.arange(len(self.tokens)) + shift
        return rows

    def of_slots(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values [T, P] of slots as the ranks get them, [M, P]."""
        return values[self.tokens]


def route_tokens(ids: NDArray[np.int64], placement: Placement) -> SentTokens:
    """Cut a batch by the owners of its experts.

    Parameters
    ----------
    ids : array of int64 [T, P]
        Below E; negative ids are skipped.
    placement : Placement

    Returns
    -------
    SentTokens

    Examples
    --------
    >>> from ktmoe_np.distributed.placement import owners_of
    >>> sent = route_tokens(np.array([[0, 3], [2, -1]]), Placement(owners_of("contiguous", 4, 2), 2))
    >>> sent.tokens.tolist(), sent.num_tokens.tolist(), sent.ids.tolist()
    ([0, 0, 1], [1, 2], [[0, -1], [-1, 1], [0, -1]])
    >>> sent.row_of_slots(2, first_row=np.array([10, 20])).tolist()
    [[10, 20], [21, -1]]
    """
    size, count = placement.num_ranks, len(ids)
    owner = np.where(ids >= 0, placement.owners[ids], size)
    goes = np.zeros((size + 1, count), np.bool_)
    goes[owner, np.arange(count)[:, None]] = True
    ranks, tokens = np.nonzero(goes[:size])
    mine = owner[tokens] == ranks[:, None]
    local = np.where(mine, placement.local[ids][tokens], -1).astype(np.int32)
    num_tokens = np.bincount(ranks, minlength=size)
    num_rows = np.bincount(ranks, weights=mine.sum(axis=1), minlength=size).astype(np.int64)
    return SentTokens(num_tokens, num_rows, tokens, local)
