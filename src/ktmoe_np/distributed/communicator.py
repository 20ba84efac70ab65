"""What the exchange asks of a communicator, and the adapters of those that people have."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Communicator", "Request", "as_communicator"]


@runtime_checkable
class Request(Protocol):
    """An exchange that has begun. Its arrays are in use until it is complete."""

    def test(self) -> bool:
        """Make progress; True once all has been sent and received, and ever after."""


@runtime_checkable
class Communicator(Protocol):
    """The ranks of a job, as the exchange sees them: few members, so that adapters are short."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def size(self) -> int:
        """N, the number of ranks."""

    def ialltoallv(
        self,
        send: NDArray[np.uint8],
        send_counts: Sequence[int],
        receive: NDArray[np.uint8],
        receive_counts: Sequence[int],
    ) -> Request:
        """Begin to send a block of bytes to each rank, and to receive one from each. Collective.

        Blocks are in the order of ranks, without gaps; exchanges are matched in the order in which they
        begin.
        """

    def dup(self) -> Communicator:
        """A communicator of the same ranks whose exchanges mix with no others. Collective."""

    def abort(self, message: str) -> None:
        """End the job on all ranks."""


def as_communicator(comm: object) -> Communicator:
    """Adapt a communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, or Communicator

    Returns
    -------
    Communicator

    Raises
    ------
    TypeError
        Something else.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and isinstance(comm, mpi.Comm):
        from .mpi import MPICommunicator

        return MPICommunicator(comm)
    if isinstance(comm, Communicator):
        return comm
    members = "rank, size, ialltoallv, dup and abort"
    raise TypeError(f"comm: got {type(comm).__name__}, expected an mpi4py communicator or one with {members}")


def blocks(counts: Sequence[int]) -> list[slice]:
    """Where the block of each rank is in an array."""
    ends = np.cumsum(counts).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def check_sizes(array: NDArray[Any], counts: Sequence[int], name: str, num_ranks: int) -> None:
    """Raise ValueError unless counts are one for each rank and add up to the array."""
    if len(counts) != num_ranks or min(counts) < 0 or sum(counts) != array.size:
        raise ValueError(
            f"{name}_counts: got {list(counts)}, expected {num_ranks} numbers from 0 on with a sum of "
            f"{array.size}, the bytes of {name}"
        )
