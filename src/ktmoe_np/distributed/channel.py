"""The calls that all ranks make together: their order, their errors, and their exchanges.

Every call begins with one exchange of headers of a fixed size, so that ranks that call different things, or
fail before there is anything to exchange, find out together and the communicator stays usable.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from .communicator import Communicator, Request, as_communicator

__all__ = ["CALLS", "Channel", "RankError", "attempt"]

Value = TypeVar("Value")

#: What ranks can call together. Their positions are in headers.
CALLS: Final = (
    "make a layer",
    "forward",
    "forward_sft",
    "backward",
    "gather",
    "rebalance",
    "reduce_gradients",
)

#: The first word of a header: changes whenever what is exchanged does.
_PROTOCOL: Final = 0x6B746D6F65_01

#: Words of a header before those that belong to a call: protocol, number, call, layer, variant, bytes of an
#: error.
_WORDS: Final = 6
_NUMBERS: Final = 2

#: Seconds that a wait polls without sleeping; then it sleeps for a part of what it has waited, and so long.
_BUSY: Final = 1e-3
_NAP_PART: Final = 1 / 32
_LONGEST_NAP: Final = 1e-3


class RankError(RuntimeError):
    """An error that is raised on all ranks at the same point of a call, so that they can call again."""


def attempt(function: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    """Call a function whose exception other ranks have to know of before it is raised."""
    try:
        return function(), None
    except Exception as error:
        return None, error


class Channel:
    """A duplicate of a communicator, which all layers on it share.

    Parameters
    ----------
    comm : communicator
        See `as_communicator`.
    timeout : float
        Seconds that an exchange may take before the channel is given up.
    """

    _of_communicators: dict[int, Channel] = {}  # noqa: RUF012

    def __init__(self, comm: object, timeout: float) -> None:
        self._source = comm  # keeps its id taken
        self.comm: Communicator = as_communicator(comm).dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        self.timeout = timeout
        self._num_calls = 0
        self._num_layers = 0
        self._broken: str | None = None
        self._lock = threading.Lock()
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    @classmethod
    def of(cls, comm: object, timeout: float) -> Channel:
        """The channel of a communicator, made by the first layer on it; collective."""
        if isinstance(comm, Channel):
            return comm
        found = cls._of_communicators.get(id(comm))
        if found is None:
            found = cls._of_communicators[id(comm)] = cls(comm, timeout)
        return found

    def new_layer(self) -> int:
        """A number for a layer, the same on all ranks as they make their layers in one order."""
        self._num_layers += 1
        return self._num_layers - 1

    def buffer(self, name: str, num_bytes: int) -> NDArray[np.uint8]:
        """Memory that calls use one after the other; its contents are undefined."""
        found = self._buffers.get(name)
        if found is None or found.size < num_bytes:
            found = self._buffers[name] = np.empty(num_bytes, np.uint8)
        return found[:num_bytes]

    # ---- calls ----

    @contextmanager
    def call(self) -> Iterator[None]:
        """Hold the channel for a call: threads of a rank have no common order, so none waits for another."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "comm: got a call while another thread of this rank is in one, expected one thread at a "
                "time, as calls have one order on all ranks"
            )
        try:
            if self._broken is not None:
                raise RuntimeError(f"comm: cannot be used any more: {self._broken}")
            try:
                yield
            except RankError:
                raise
            except BaseException as error:  # other ranks are in the middle of the call, and stay there
                self.give_up(f"{type(error).__name__} on rank {self.rank} in the middle of a call")
                raise
        finally:
            self._lock.release()

    def agree(
        self,
        call: str,
        layer: int,
        error: Exception | None,
        numbers: Sequence[tuple[int, int]] | NDArray[np.int64] | None = None,
        variant: int = 0,
    ) -> NDArray[np.int64]:
        """Begin a call on all ranks: exchange what it is, whether a rank has failed, and two numbers.

        Parameters
        ----------
        call : str
            One of `CALLS`.
        layer : int
            Which layer's.
        error : Exception, optional
            What this rank has found wrong; all ranks raise.
        numbers : array of int64 [N, 2], optional
            For each rank.
        variant : int
            What else has to be the same on all ranks.

        Returns
        -------
        array of int64 [N, 2]
            The numbers of each rank for this one.

        Raises
        ------
        RankError
            A rank has failed, or ranks call different things; the channel can be used again.
        TimeoutError
            Not all ranks came; the channel cannot be used any more.
        """
        message = b"" if error is None else f"{type(error).__name__}: {error}".encode()
        header = np.zeros((self.size, _WORDS + _NUMBERS), np.int64)
        header[:, :_WORDS] = _PROTOCOL, self._num_calls, CALLS.index(call), layer, variant, len(message)
        if error is None and numbers is not None:
            header[:, _WORDS:] = numbers
        self._num_calls += 1
        what = f"all ranks to begin {_described(call, layer)}"
        got = self.exchange_equal(header, what)
        self._check_protocol(got[:, 0])
        lengths = got[:, _WORDS - 1]
        self.raise_errors(message, lengths, error)
        self._check_same(got[:, 1 : _WORDS - 1])
        return got[:, _WORDS:]

    def _check_protocol(self, words: NDArray[np.int64]) -> None:
        other = np.flatnonzero(words != words[0])
        if other.size:
            self._broken = f"ranks 0 and {other[0]} run different versions of ktmoe_np"
            raise RuntimeError(f"comm: {self._broken}, expected the same on all")

    def raise_errors(self, message: bytes, lengths: NDArray[np.int64], error: Exception | None) -> None:
        """Exchange the messages of ranks that have failed, of known lengths, and raise them on all ranks."""
        if not lengths.any():
            return
        send = np.frombuffer(message * self.size, np.uint8)
        got = np.empty(int(lengths.sum()), np.uint8)
        sizes = [int(n) for n in lengths]
        self.wait(self.comm.ialltoallv(send, [len(message)] * self.size, got, sizes), "messages of errors")
        ends = np.cumsum(lengths)
        texts = [
            f"rank {rank}: {got[end - size : end].tobytes().decode(errors='replace')}"
            for rank, (end, size) in enumerate(zip(ends, sizes, strict=True))
            if size
        ]
        raise RankError("; ".join(texts)) from error

    def _check_same(self, calls: NDArray[np.int64]) -> None:
        """Raise where a rank is in another call than rank 0."""
        other = np.flatnonzero((calls != calls[0]).any(axis=1))
        if not other.size:
            return
        rank = int(other[0])
        (number, *first), (other_number, *second) = calls[0].tolist(), calls[rank].tolist()
        names = _described(CALLS[first[0]], *first[1:]), _described(CALLS[second[0]], *second[1:])
        raise RankError(
            f"comm: rank 0 calls {names[0]} (its call {number}) while rank {rank} calls {names[1]} "
            f"(its call {other_number}), expected the same calls in the same order on all ranks"
        )

    # ---- exchanges ----

    def exchange_equal(self, send: NDArray[np.int64], what: str) -> NDArray[np.int64]:
        """Send row r of an array to rank r and return the rows of all ranks for this one."""
        got = np.empty_like(send)
        sizes = [send.nbytes // self.size] * self.size
        self.wait(self.comm.ialltoallv(_bytes(send), sizes, _bytes(got), sizes), what)
        return got

    def gather(self, data: bytes, layer: int = 0, error: Exception | None = None) -> list[bytes]:
        """The bytes of every rank; a call of its own, which an error of one rank ends on all."""
        lengths = self.agree("gather", layer, error, [(len(data), 0)] * self.size)[:, 0]
        got = np.empty(int(lengths.sum()), np.uint8)
        send = np.frombuffer(data * self.size, np.uint8)
        sizes = [int(n) for n in lengths]
        self.wait(self.comm.ialltoallv(send, [len(data)] * self.size, got, sizes), "what ranks gather")
        ends = np.cumsum(lengths)
        return [got[end - size : end].tobytes() for end, size in zip(ends, sizes, strict=True)]

    def begin(
        self, send: NDArray[Any], send_rows: Sequence[int], receive: NDArray[Any], receive_rows: Sequence[int]
    ) -> Request:
        """Begin to exchange rows of arrays [rows, ...]: those for and from each rank, in their order."""
        return self.comm.ialltoallv(
            _bytes(send), _in_bytes(send, send_rows), _bytes(receive), _in_bytes(receive, receive_rows)
        )

    def wait(self, request: Request, what: str) -> None:
        """Wait until an exchange is complete.

        Raises
        ------
        TimeoutError
            It took longer than the timeout: no later call works, and the job ends with this process.
        """
        self.wait_until(request.test, what)

    def wait_until(self, is_done: Callable[[], bool], what: str) -> None:
        """Poll until something is done, as `wait` does; an exception leaves it unfinished for good."""
        begin = time.monotonic()
        try:
            while not is_done():
                elapsed = time.monotonic() - begin
                if elapsed > self.timeout:
                    raise TimeoutError(f"comm: waited {self.timeout:g} s for {what}")
                time.sleep(0 if elapsed < _BUSY else min(elapsed * _NAP_PART, _LONGEST_NAP))
        except BaseException as error:
            self.give_up(
                f"rank {self.rank} was interrupted by {type(error).__name__} while it waited for {what}"
            )
            raise

    def give_up(self, why: str) -> None:
        """Let every later call raise, and the job end with this process: other ranks wait for it."""
        if self._broken is None:
            self._broken = why
            abort_at_exit = getattr(self.comm, "abort_at_exit", None)
            if abort_at_exit is not None:
                abort_at_exit(f"ktmoe_np: {why}")


def _described(call: str, layer: int, variant: int = 0) -> str:
    return f"{call} of layer {layer}" + (f" (variant {variant})" if variant else "")


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def _in_bytes(array: NDArray[Any], rows: Sequence[int]) -> list[int]:
    width = array[:1].nbytes if len(array) else 0
    return [int(n) * width for n in rows]
