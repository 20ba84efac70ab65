"""Ranks that are threads of one process: for tests, and to try things out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .communicator import Request, blocks, check_sizes

__all__ = ["ThreadCommunicator"]


class _World:
    """What the ranks of a communicator share: the messages from each rank to each, in their order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lock = threading.Lock()
        self.queues: dict[tuple[int, int], deque[NDArray[np.uint8]]] = {
            (source, to): deque() for source in range(size) for to in range(size)
        }
        self.aborted: str | None = None
        self.duplicates: list[_World] = []

    def duplicate(self, number: int) -> _World:
        """The world of a rank's duplicate of that number, which the first rank to come makes."""
        with self.lock:
            while len(self.duplicates) <= number:
                self.duplicates.append(_World(self.size))
            return self.duplicates[number]


@dataclass(eq=False)
class _ThreadRequest:
    """An exchange of a rank, and the ranks whose blocks it waits for."""

    comm: ThreadCommunicator
    receive: NDArray[np.uint8]
    counts: Sequence[int]
    missing: set[int] = field(default_factory=set)

    def test(self) -> bool:
        self.comm._deliver()
        return not self.missing


class ThreadCommunicator:
    """A rank that is a thread; what is sent is copied when the exchange begins.

    Examples
    --------
    >>> import numpy as np
    >>> first, second = ThreadCommunicator.create(2)
    >>> received = np.empty(2, np.uint8), np.empty(2, np.uint8)
    >>> requests = [
    ...     comm.ialltoallv(np.array([10 * comm.rank, 10 * comm.rank + 1], np.uint8), [1, 1], array, [1, 1])
    ...     for comm, array in zip((first, second), received)
    ... ]
    >>> [request.test() for request in requests], [array.tolist() for array in received]
    ([True, True], [[0, 10], [1, 11]])
    """

    def __init__(self, world: _World, rank: int) -> None:
        self._world = world
        self.rank = rank  #: from 0
        self.size = world.size  #: N
        self._num_duplicates = 0
        #: The exchanges that wait for a block of each rank, the oldest first.
        self._waiting: list[deque[_ThreadRequest]] = [deque() for _ in range(world.size)]

    @classmethod
    def create(cls, size: int) -> list[ThreadCommunicator]:
        """The communicators of so many ranks, each for a thread of its own.

        Raises
        ------
        ValueError
            Fewer than one rank.
        """
        if size < 1:
            raise ValueError(f"size: got {size}, expected 1 or more")
        world = _World(size)
        return [cls(world, rank) for rank in range(size)]

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
        RuntimeError
            A rank has aborted. From `test`: a block of another size than was expected.
        """
        check_sizes(send, send_counts, "send", self.size)
        check_sizes(receive, receive_counts, "receive", self.size)
        self._check_alive()
        for to, block in enumerate(blocks(send_counts)):
            self._world.queues[self.rank, to].append(send[block].copy())
        request = _ThreadRequest(self, receive, list(receive_counts), set(range(self.size)))
        for waiting in self._waiting:
            waiting.append(request)
        return request

    def _deliver(self) -> None:
        """Give what has come to the exchanges that wait for it."""
        self._check_alive()
        for source, waiting in enumerate(self._waiting):
            queue = self._world.queues[source, self.rank]
            while queue and waiting:
                data, request = queue.popleft(), waiting.popleft()
                expected = request.counts[source]
                if len(data) != expected:
                    raise RuntimeError(
                        f"comm: got {len(data)} bytes from rank {source} on rank {self.rank}, expected "
                        f"{expected}"
                    )
                request.receive[blocks(request.counts)[source]] = data
                request.missing.discard(source)

    def _check_alive(self) -> None:
        if self._world.aborted is not None:
            raise RuntimeError(f"comm: the job was aborted: {self._world.aborted}")

    def dup(self) -> ThreadCommunicator:
        """The rank of another communicator, which the n-th call makes for all ranks."""
        self._num_duplicates += 1
        return ThreadCommunicator(self._world.duplicate(self._num_duplicates - 1), self.rank)

    def abort(self, message: str) -> None:
        """Let all calls of all ranks raise from now on."""
        self._world.aborted = message
