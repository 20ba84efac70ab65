"""Which rank has which experts."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import expert_ids
from ..arrays.types import IntegersLike

__all__ = ["Placement", "PlacementLike", "balanced_owners", "owners_of"]

#: The names of placements, or the rank of each expert.
PlacementLike: TypeAlias = Literal["contiguous", "strided"] | IntegersLike


def owners_of(placement: PlacementLike, num_experts: int, num_ranks: int) -> NDArray[np.int32]:
    """The rank that owns each expert.

    Parameters
    ----------
    placement : {"contiguous", "strided"} or array of integers [E]
        ``contiguous``: rank 0 has the first experts, and so on; where E / N is no integer, the first ranks
        have one more. ``strided``: rank e % N has expert e. Or the rank of each expert.
    num_experts : int
        E.
    num_ranks : int
        N.

    Returns
    -------
    array of int32 [E]

    Raises
    ------
    ValueError
        An unknown name, another number of experts, or a rank that would have none.
    TypeError
        Neither a name nor integers.
    IndexError
        A rank outside 0 to N - 1.

    Examples
    --------
    >>> owners_of("contiguous", 5, 2).tolist(), owners_of("strided", 5, 2).tolist()
    ([0, 0, 0, 1, 1], [0, 1, 0, 1, 0])
    """
    experts = np.arange(num_experts)
    if isinstance(placement, str):
        if placement == "contiguous":
            small, large = divmod(num_experts, num_ranks)
            edge = large * (small + 1)
            owners = np.where(
                experts < edge, experts // (small + 1), large + (experts - edge) // max(small, 1)
            )
        elif placement == "strided":
            owners = experts % num_ranks
        else:
            raise ValueError(
                f"placement: got {placement!r}, expected 'contiguous', 'strided' or the rank of each expert"
            )
    else:
        owners = expert_ids(placement, "placement")
        if owners.shape != (num_experts,):
            raise ValueError(f"placement: got shape {list(owners.shape)}, expected [{num_experts}]")
        wrong = np.flatnonzero((owners < 0) | (owners >= num_ranks))
        if wrong.size:
            at = int(wrong[0])
            raise IndexError(
                f"placement: got rank {owners[at]} for expert {at}, expected 0 to {num_ranks - 1}"
            )
    idle = np.flatnonzero(np.bincount(owners, minlength=num_ranks) == 0)
    if idle.size:
        raise ValueError(
            f"placement: got no expert for rank {idle[0]} of {num_ranks}, expected one at least: "
            f"the layer has {num_experts}"
        )
    return owners.astype(np.int32)


def balanced_owners(expert_tokens: IntegersLike, num_ranks: int) -> NDArray[np.int32]:
    """Owners by which ranks have about the same work, and as many experts but for one.

    The expert with the most tokens goes first, each to the rank with the fewest tokens that still takes one.

    Parameters
    ----------
    expert_tokens : array of integers [E]
        What experts have computed, as `LayerStats.expert_tokens` counts it.
    num_ranks : int
        N.

    Returns
    -------
    array of int32 [E]

    Raises
    ------
    TypeError
        Not integers.
    ValueError
        Fewer experts than ranks, or another number of axes.

    Examples
    --------
    >>> balanced_owners([9, 1, 8, 2], 2).tolist()
    [0, 0, 1, 1]
    """
    tokens = expert_ids(expert_tokens, "expert_tokens")
    if tokens.ndim != 1 or len(tokens) < num_ranks:
        raise ValueError(f"expert_tokens: got shape {list(tokens.shape)}, expected [E], at least {num_ranks}")
    most = -(-len(tokens) // num_ranks)
    least_full = len(tokens) // num_ranks
    room = np.full(num_ranks, least_full)
    extra = len(tokens) - least_full * num_ranks  # ranks that may have one more
    load, owners = np.zeros(num_ranks, np.int64), np.empty(len(tokens), np.int32)
    taken = np.zeros(num_ranks, np.int64)
    for expert in np.argsort(-tokens, kind="stable"):
        free = taken < (room if extra == 0 else most)
        rank = min(np.flatnonzero(free).tolist(), key=lambda r: (load[r], taken[r]))
        extra -= int(taken[rank] == least_full)
        owners[expert] = rank
        load[rank] += tokens[expert]
        taken[rank] += 1
    return owners


class Placement:
    """The experts of every rank, and their numbers there.

    Parameters
    ----------
    owners : array of int32 [E]
        As `owners_of` gives them.
    num_ranks : int
        N.

    Attributes
    ----------
    owners : array of int32 [E]
        The rank of each expert.
    local : array of int32 [E]
        The number of each expert on its rank: experts are in the order of their ids there.
    """

    def __init__(self, owners: NDArray[np.int32], num_ranks: int) -> None:
        self.owners = owners
        self.num_ranks = num_ranks
        self.local = np.empty(len(owners), np.int32)
        for rank in range(num_ranks):
            experts = self.experts_of(rank)
            self.local[experts] = np.arange(len(experts))
        self.owners.flags.writeable = self.local.flags.writeable = False

    def experts_of(self, rank: int) -> NDArray[np.int64]:
        """The ids of a rank's experts, ascending.

        Examples
        --------
        >>> Placement(owners_of("strided", 5, 2), 2).experts_of(1).tolist()
        [1, 3]
        """
        return np.flatnonzero(self.owners == rank)
