"""mpi4py's communicators."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from .communicator import Request, blocks, check_sizes

__all__ = ["MPICommunicator"]

#: Bytes of a message: MPI before version 4 counts them in 32 bits.
_MAX_MESSAGE = 2**30

#: Tags of exchanges, which MPI guarantees to have.
_NUM_TAGS = 2**15


class _MPIRequest:
    """The messages of an exchange, and the arrays that they use."""

    def __init__(self, requests: list[MPI.Request], *arrays: object) -> None:
        self._requests = requests
        self._arrays: tuple[object, ...] = arrays

    def test(self) -> bool:
        if self._requests and MPI.Request.Testall(self._requests):
            self._requests, self._arrays = [], ()
        return not self._requests


class MPICommunicator:
    """An mpi4py communicator.

    Exchanges are messages between pairs of ranks. MPI's own collective that does not block goes wrong with
    Open MPI 4 where a rank has nothing to exchange: there it does not count, and later ones meet those of
    others.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Not an inter-communicator.

    Raises
    ------
    TypeError
        An inter-communicator.
    RuntimeError
        MPI was initialized for other threads than this one.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        if comm.Is_inter():
            raise TypeError("comm: got an inter-communicator, expected the ranks of one group")
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED and not MPI.Is_thread_main():
            raise RuntimeError(
                f"comm: got MPI with thread level {MPI.Query_thread()} in another thread than that of MPI's "
                "initialization, expected MPI_THREAD_SERIALIZED or above"
            )
        self._comm = comm
        self._num_exchanges = 0
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def ialltoallv(
        self,
        send: NDArray[np.uint8],
        send_counts: Sequence[int],
        receive: NDArray[np.uint8],
        receive_counts: Sequence[int],
    ) -> Request:
        """Begin an exchange: see `Communicator`.

        Raises
        ------
        ValueError
            Counts that do not add up to the arrays.
        """
        check_sizes(send, send_counts, "send", self.size)
        check_sizes(receive, receive_counts, "receive", self.size)
        comm, tag = self._comm, self._num_exchanges % _NUM_TAGS
        self._num_exchanges += 1
        requests = [
            exchange([part, MPI.BYTE], rank, tag)
            for exchange, array, counts in (
                (comm.Irecv, receive, receive_counts),
                (comm.Isend, send, send_counts),
            )
            for rank, part in _messages(array, counts)
            if rank != self.rank
        ]
        receive[blocks(receive_counts)[self.rank]] = send[blocks(send_counts)[self.rank]]
        return _MPIRequest(requests, send, receive)

    def dup(self) -> MPICommunicator:
        """A duplicate, by MPI_Comm_dup. Collective."""
        return MPICommunicator(self._comm.Dup())

    def abort(self, message: str) -> None:
        """End the job, by MPI_Abort; the message goes to standard error."""
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
        self._comm.Abort(1)

    def abort_at_exit(self, message: str) -> None:
        """End the job with this process: with an exchange that nobody finishes, MPI would wait for ever."""
        # MPI is finalized by a handler of the interpreter that runs after those that were registered later.
        atexit.register(self.abort, message)


def _messages(array: NDArray[np.uint8], counts: Sequence[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The messages that blocks are sent in: each with its rank, none for an empty block."""
    for rank, block in enumerate(blocks(counts)):
        for at in range(block.start, block.stop, _MAX_MESSAGE):
            yield rank, array[at : min(at + _MAX_MESSAGE, block.stop)]
