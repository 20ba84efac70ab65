"""Slices of a batch on their way: sent to the experts' ranks, computed there, returned, and summed.

A rank keeps in one matrix of float32 rows what it has computed and what comes back::

    rows   [ from rank 0, 1, .. (not this one) | for rank 0, 1, .. (not this one) | own ]
             received                            computed, and sent                computed

so that nothing of its own is copied or exchanged, and sums read all rows of its tokens from one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kt_kernel_ext as ext
from ..inference.base import BaseMoEWrapper
from ..passes.batch import Batch
from .channel import Channel
from .communicator import Request
from .exchange import SentTokens

__all__ = ["ExactSlice", "FastSlice", "Slice", "Status", "run_slices"]

#: Slices whose memory is in use at a time: one is received, one computed, one returned and summed.
_IN_FLIGHT = 3


class Slice:
    """Some tokens of each rank.

    Parameters
    ----------
    channel : Channel
    layer : BaseMoEWrapper
        This rank's experts.
    batch : Batch
        This rank's tokens.
    cut : slice
        Those of this slice.
    sent : SentTokens
        Where they go.
    arriving : array of int64 [N]
        Tokens that each rank sends here.
    number : int
        Of the slice in its call.
    """

    #: Whether ranks need the routing weights.
    sends_weights: bool

    def __init__(
        self,
        channel: Channel,
        layer: BaseMoEWrapper,
        batch: Batch,
        cut: slice,
        sent: SentTokens,
        arriving: NDArray[np.int64],
        number: int,
    ) -> None:
        self._channel = channel
        self._layer = layer
        self._config = layer.config
        self._sent = sent
        self._arriving = _without(arriving, channel.rank)
        self._num_own = int(arriving[channel.rank])
        self._memory = number % _IN_FLIGHT
        self._hidden, self._out = batch.hidden_states[cut], batch.out[cut]
        self._ids_dtype = batch.activation_dtype
        self._weights = batch.weights[cut]
        self._requests: list[Request] = []

    def _buffer(self, name: str, rows: int, width: int, dtype: type[np.generic]) -> NDArray[Any]:
        num_bytes = rows * width * np.dtype(dtype).itemsize
        return self._channel.buffer(f"{name} {self._memory}", num_bytes).view(dtype).reshape(rows, width)

    # ---- to the experts ----

    def send(self) -> None:
        """Begin to send tokens to their ranks and to receive those of others."""
        own = self._sent.block(self._channel.rank)
        leaving = _without(self._sent.num_tokens, self._channel.rank)
        hidden = self._hidden.view(np.uint16)
        self._x = self._exchange("x", hidden, own, leaving, np.uint16)
        weights = [self._weights.view(np.int32)] if self.sends_weights else []
        routes = [self._sent.ids, *(self._sent.of_slots(array) for array in weights)]
        self._routes = self._exchange_rows("routes", np.concatenate(routes, axis=1), own, leaving)

    def _exchange(
        self, name: str, source: NDArray[Any], own: slice, leaving: NDArray[np.int64], dtype: type[np.generic]
    ) -> NDArray[Any]:
        """Exchange rows of tokens: those of others come first, by rank, and then this rank's own."""
        tokens, width = self._sent.tokens, source.shape[1]
        others = np.concatenate([tokens[: own.start], tokens[own.stop :]])
        send = self._buffer(f"{name} sent", len(others), width, dtype)
        np.take(source, others, axis=0, out=send, mode="clip")
        got = self._buffer(name, int(self._arriving.sum()) + self._num_own, width, dtype)
        np.take(source, tokens[own], axis=0, out=got[len(got) - self._num_own :], mode="clip")
        self._begin(send, leaving, got, self._arriving)
        return got

    def _exchange_rows(
        self, name: str, rows: NDArray[np.int32], own: slice, leaving: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        """The same for rows that are in the order of ranks already."""
        others = np.concatenate([rows[: own.start], rows[own.stop :]])
        got = self._buffer(name, int(self._arriving.sum()) + self._num_own, rows.shape[1], np.int32)
        got[len(got) - self._num_own :] = rows[own]
        self._begin(others, leaving, got, self._arriving)
        return got

    def _begin(
        self,
        send: NDArray[Any],
        leaving: NDArray[np.int64],
        receive: NDArray[Any],
        arriving: NDArray[np.int64],
    ) -> None:
        if self._channel.size > 1:
            self._requests.append(
                self._channel.begin(send, leaving.tolist(), receive[: int(arriving.sum())], arriving.tolist())
            )

    def is_here(self) -> bool:
        """Whether all that was begun is complete; makes progress."""
        self._requests = [request for request in self._requests if not request.test()]
        return not self._requests

    # ---- at the experts ----

    def tasks(self) -> list[ext.Task]:
        """Compute the rows of all tokens that have come."""
        slots = self._config.num_experts_per_tok
        ids = self._routes[:, :slots].astype(np.int64)
        weights = np.ascontiguousarray(self._routes[:, slots:]).view(np.float32)
        if not self.sends_weights:
            weights = np.ones(ids.shape, np.float32)
        rows_of = self._rows_of_tokens(ids)
        self._edges = edges = np.concatenate([[0], np.cumsum(rows_of)])
        others = len(ids) - self._num_own
        self._num_back = int(_without(self._num_returned(), self._channel.rank).sum())
        self._num_sent = int(edges[others])
        self._rows = self._buffer(
            "rows", self._num_back + int(edges[-1]), self._config.hidden_size, np.float32
        )
        computed = self._rows[self._num_back :]
        x = self._x.view(self._hidden.dtype)
        step = self._layer.chunked_prefill_size
        tasks: list[ext.Task] = []
        for at in range(0, len(ids), step):
            chunk = slice(at, at + step)
            rows = computed[edges[at] : edges[min(at + step, len(ids))]]
            tasks += self._chunk_tasks(x[chunk], ids[chunk], weights[chunk], rows)
        return tasks

    def _rows_of_tokens(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many rows each token gives."""
        raise NotImplementedError

    def _num_returned(self) -> NDArray[np.int64]:
        """How many rows each rank returns for the tokens of this one, [N]."""
        raise NotImplementedError

    def _chunk_tasks(
        self, x: NDArray[Any], ids: NDArray[np.int64], weights: NDArray[np.float32], rows: NDArray[np.float32]
    ) -> Sequence[ext.Task]:
        raise NotImplementedError

    # ---- and back ----

    def send_back(self) -> None:
        """Begin to return what was computed and to receive what others have computed."""
        ends = np.cumsum(self._arriving)
        leaving = self._edges[ends] - self._edges[ends - self._arriving]
        arriving = _without(self._num_returned(), self._channel.rank)
        computed = self._rows[self._num_back : self._num_back + self._num_sent]
        self._begin(computed, leaving, self._rows, arriving)

    def sum_task(self) -> ext.Task:
        """Sum the rows of this rank's tokens."""
        arriving = _without(self._num_returned(), self._channel.rank)
        first = np.cumsum(arriving) - arriving
        first[self._channel.rank] = self._num_back + self._num_sent
        rows, weights = self._sources(first)
        return ext.moe.combine_rows_task(
            self._layer.cpu_infer.backend_, self._rows, rows, weights, self._hidden, self._out
        )

    def _sources(self, first_row: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
        """What each token is the sum of, and the weights there."""
        raise NotImplementedError


class ExactSlice(Slice):
    """Ranks return a row for each slot: sums have the order, and so the bits, of one process."""

    @property
    def sends_weights(self) -> bool:  # type: ignore[override]
        """Where they scale the inputs."""
        return self._config.scale_inputs

    def _rows_of_tokens(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        found: NDArray[np.int64] = (ids >= 0).sum(axis=1)
        return found

    def _num_returned(self) -> NDArray[np.int64]:
        return self._sent.num_rows

    def _chunk_tasks(
        self, x: NDArray[Any], ids: NDArray[np.int64], weights: NDArray[np.float32], rows: NDArray[np.float32]
    ) -> Sequence[ext.Task]:
        layer = self._layer._layer
        return [layer.expert_rows_task(x, ids, weights, rows, activation_dtype=self._ids_dtype)]

    def _sources(self, first_row: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
        weights = None if self._config.scale_inputs else self._weights
        return self._sent.row_of_slots(len(self._hidden), first_row), weights


class FastSlice(Slice):
    """Ranks return a row for each token: their part of its sum."""

    sends_weights = True

    def _rows_of_tokens(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.ones(len(ids), np.int64)

    def _num_returned(self) -> NDArray[np.int64]:
        return self._sent.num_tokens

    def _chunk_tasks(
        self, x: NDArray[Any], ids: NDArray[np.int64], weights: NDArray[np.float32], rows: NDArray[np.float32]
    ) -> Sequence[ext.Task]:
        size = max(len(x), 1)
        return self._layer._layer.forward_tasks(x, ids, weights, rows, size, activation_dtype=self._ids_dtype)

    def _sources(self, first_row: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
        return self._sent.row_of_ranks(len(self._hidden), first_row), None


def _without(counts: NDArray[np.int64], rank: int) -> NDArray[np.int64]:
    """Counts by rank, none for one rank."""
    others = counts.copy()
    others[rank] = 0
    return others


class Status:
    """Whether every rank has computed its slices: exchanged at the end of a call, with the last rows."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.error: Exception | None = None

    def begin(self) -> None:
        """Tell all ranks, with the size of this one's message."""
        text = "" if self.error is None else f"{type(self.error).__name__}: {self.error}"
        self._message = text.encode()
        self._sent = np.full((self._channel.size, 1), len(self._message), np.int64)
        self._got = np.zeros_like(self._sent)
        one = [1] * self._channel.size
        self._request = self._channel.begin(self._sent, one, self._got, one)

    def finish(self) -> None:
        """Raise on all ranks if one has failed."""
        self._channel.wait(self._request, "the other ranks to have computed")
        self._channel.raise_errors(self._message, self._got[:, 0], self.error)


def run_slices(channel: Channel, slices: Sequence[Slice], engine: ext.CPUInfer) -> None:
    """Send, compute, return and sum all slices, several at a time.

    Raises
    ------
    RankError
        A rank has failed to compute; raised on all when nothing is under way any more.
    """
    status = Status(channel)
    tickets: list[ext.Ticket] = []
    slices[0].send()
    for at, now in enumerate(slices):
        channel.wait_until(now.is_here, "tokens of other ranks")
        tasks = now.tasks()
        if len(slices) == 1:
            _compute(status, partial(engine.run, tasks))
        else:
            tickets = [engine.submit(task) for task in tasks]
            if at > 0:  # meanwhile: the rows of the slice before, and the tokens of the next
                before = slices[at - 1]
                channel.wait_until(before.is_here, "rows that other ranks have computed")
            if at + 1 < len(slices):
                slices[at + 1].send()
            moving = slices[at + 1 : at + 2]
            channel.wait_until(partial(_is_done, engine, tickets, moving), "this rank's experts")
            _compute(status, partial(_raise_errors, engine, tickets))
            if at > 0:
                engine.run(slices[at - 1].sum_task())
        now.send_back()
    status.begin()
    channel.wait_until(slices[-1].is_here, "rows that other ranks have computed")
    status.finish()
    engine.run(slices[-1].sum_task())


def _compute(status: Status, function: Callable[[], object]) -> None:
    """What fails here is told to all ranks in the end."""
    try:
        function()
    except Exception as error:
        status.error = status.error or error


def _is_done(engine: ext.CPUInfer, tickets: Sequence[ext.Ticket], moving: Sequence[Slice]) -> bool:
    for one in moving:
        one.is_here()
    return not tickets or tickets[-1].number <= engine.num_completed


def _raise_errors(engine: ext.CPUInfer, tickets: Sequence[ext.Ticket]) -> None:
    for ticket in tickets:
        engine.wait(ticket)
