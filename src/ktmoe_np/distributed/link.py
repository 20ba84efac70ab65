"""A network that is not there: how long an exchange would take over links of a latency and a bandwidth."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .communicator import Communicator, Request, as_communicator

__all__ = ["SimulatedLink"]


class _DelayedRequest:
    """An exchange that is complete at a time, and not before it really is."""

    def __init__(self, request: Request, ready: float) -> None:
        self._request = request
        self._ready = ready

    def test(self) -> bool:
        return self._request.test() and time.monotonic() >= self._ready


class SimulatedLink:
    """A communicator whose ranks are joined by slower links than they are.

    Each rank has one link, in both directions at once. Its exchanges follow each other on it: one takes as
    long as the larger of what the rank sends and receives, and arrives a latency later. Bytes to itself
    take no time.

    Parameters
    ----------
    comm : communicator
        The real one; see `as_communicator`.
    latency : float
        Seconds.
    bandwidth : float
        Bytes per second and direction.

    Attributes
    ----------
    bytes_sent, bytes_received : int
        By this rank, those to itself left out.

    Raises
    ------
    ValueError
        A negative latency, or a bandwidth that is not above 0.
    """

    def __init__(self, comm: object, *, latency: float, bandwidth: float) -> None:
        if not latency >= 0:
            raise ValueError(f"latency: got {latency}, expected 0 or more seconds")
        if not bandwidth > 0:
            raise ValueError(f"bandwidth: got {bandwidth}, expected bytes per second above 0")
        self._comm: Communicator = as_communicator(comm)
        self._latency, self._bandwidth = latency, bandwidth
        self._free_at = 0.0  # when the link has done what was begun
        self.rank, self.size = self._comm.rank, self._comm.size
        self.bytes_sent = self.bytes_received = 0
        self._origin = self

    def ialltoallv(
        self,
        send: NDArray[np.uint8],
        send_counts: Sequence[int],
        receive: NDArray[np.uint8],
        receive_counts: Sequence[int],
    ) -> Request:
        """Begin an exchange: see `Communicator`."""
        sent = sum(send_counts) - send_counts[self.rank]
        received = sum(receive_counts) - receive_counts[self.rank]
        link = self._origin
        link.bytes_sent += sent
        link.bytes_received += received
        link._free_at = max(link._free_at, time.monotonic()) + max(sent, received) / self._bandwidth
        request = self._comm.ialltoallv(send, send_counts, receive, receive_counts)
        return _DelayedRequest(request, link._free_at + (self._latency if self.size > 1 else 0.0))

    def dup(self) -> SimulatedLink:
        """A duplicate over the same link, on which its exchanges take their turn and count."""
        copy = SimulatedLink(self._comm.dup(), latency=self._latency, bandwidth=self._bandwidth)
        copy._origin = self._origin
        return copy

    def abort(self, message: str) -> None:
        """End the job on all ranks."""
        self._comm.abort(message)
