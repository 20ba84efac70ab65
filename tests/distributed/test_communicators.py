"""Communicators: do blocks arrive whole, in order, in time, and are mistakes named?"""

from __future__ import annotations

import doctest
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import AnyArray, Batch, draw_batch, draw_layer
from ranks import experts_of, on_ranks, picked

import ktmoe_np.distributed.threads
from ktmoe_np.distributed import (
    Communicator,
    ExpertParallel,
    SimulatedLink,
    ThreadCommunicator,
    as_communicator,
)

_NOWHERE = np.empty(0, np.uint8)


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.distributed.threads).failed == 0


def finish(request: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not request.test():
        assert time.monotonic() < end
        time.sleep(0)
    assert request.test()  # and ever after


@given(st.data(), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 2**32 - 1))
def test_exchanges(data: st.DataObject, size: int, num_exchanges: int, wait_last: bool, seed: int) -> None:
    """Random blocks, some empty; several exchanges at a time on two communicators of the same ranks."""
    sizes = np.array(
        data.draw(
            st.lists(
                st.integers(0, 40),
                min_size=2 * num_exchanges * size * size,
                max_size=2 * num_exchanges * size * size,
            )
        )
    ).reshape(2, num_exchanges, size, size)
    rng = np.random.default_rng(seed)
    blocks = [
        [[[rng.integers(0, 256, n, np.uint8) for n in row] for row in one] for one in half] for half in sizes
    ]

    def rank(comm: Any) -> list[list[AnyArray]]:
        both = comm, SimulatedLink(comm, latency=0.0, bandwidth=1e12).dup()
        found, requests = [], []
        for number in range(num_exchanges):
            for half, one in enumerate(both):
                outgoing, counts = blocks[half][number], sizes[half, number]
                got = np.empty(counts[:, comm.rank].sum(), np.uint8)
                send = np.concatenate([*outgoing[comm.rank], _NOWHERE])
                request = one.ialltoallv(send, counts[comm.rank].tolist(), got, counts[:, comm.rank].tolist())
                send[:] = 0  # a copy was taken
                requests.append(request)
                found.append(np.split(got, np.cumsum(counts[:, comm.rank])[:-1]))
        for request in reversed(requests) if wait_last else requests:
            finish(request)
        return found

    for me, found in enumerate(on_ranks(size, rank)):
        order = [(half, number) for number in range(num_exchanges) for half in range(2)]
        for (half, number), got in zip(order, found, strict=True):
            for source in range(size):
                assert got[source].tolist() == blocks[half][number][source][me].tolist()


def test_mistakes() -> None:
    first, second = ThreadCommunicator.create(2)
    some = np.zeros(3, np.uint8)
    with pytest.raises(
        ValueError, match=r"send_counts: got \[1, 1\], expected 2 numbers from 0 on with a sum of 3"
    ):
        first.ialltoallv(some, [1, 1], some, [1, 2])
    with pytest.raises(ValueError, match=r"receive_counts: got \[3\], expected 2 numbers"):
        first.ialltoallv(some, [1, 2], some, [3])
    with pytest.raises(ValueError, match=r"send_counts: got \[-1, 4\]"):
        first.ialltoallv(some, [-1, 4], some, [1, 2])
    first.ialltoallv(some, [1, 2], some.copy(), [1, 2])
    with pytest.raises(RuntimeError, match="comm: got 2 bytes from rank 0 on rank 1, expected 3"):
        second.ialltoallv(some, [3, 0], some.copy(), [3, 0]).test()
    with pytest.raises(ValueError, match="size: got 0, expected 1 or more"):
        ThreadCommunicator.create(0)


def test_abort() -> None:
    first, second = ThreadCommunicator.create(2)
    request = first.ialltoallv(_NOWHERE, [0, 0], _NOWHERE, [0, 0])
    SimulatedLink(second, latency=0, bandwidth=1).abort("it is over")
    for call in (request.test, lambda: second.ialltoallv(_NOWHERE, [0, 0], _NOWHERE, [0, 0])):
        with pytest.raises(RuntimeError, match="comm: the job was aborted: it is over"):
            call()


def test_what_is_a_communicator() -> None:
    (comm,) = ThreadCommunicator.create(1)
    assert as_communicator(comm) is comm
    assert isinstance(SimulatedLink(comm, latency=0, bandwidth=1), Communicator)
    message = (
        "comm: got str, expected an mpi4py communicator or one with rank, size, ialltoallv, dup and abort"
    )
    with pytest.raises(TypeError, match=message):
        as_communicator("world")


@pytest.mark.serial
def test_times_of_a_link() -> None:
    """Exchanges follow each other on a rank's link, whatever duplicate they are on."""

    def rank(comm: Any) -> tuple[list[float], int, int]:
        link = SimulatedLink(comm, latency=0.05, bandwidth=10_000)
        other = link.dup()
        counts = [0, 1000] if comm.rank == 0 else [0, 5000]  # bytes to itself take no time
        arriving = [0, 0] if comm.rank == 0 else [1000, 5000]
        begin, took, requests = time.monotonic(), [], []
        for one in (link, other):
            got = np.empty(sum(arriving), np.uint8)
            requests.append(one.ialltoallv(np.zeros(sum(counts), np.uint8), counts, got, arriving))
        for request in requests:
            finish(request)
            took.append(time.monotonic() - begin)
        return took, link.bytes_sent, link.bytes_received

    for number, (took, sent, received) in enumerate(on_ranks(2, rank)):
        assert 0.15 <= took[0] < 0.22
        assert 0.25 <= took[1] < 0.4
        assert (sent, received) == [(2000, 0), (0, 2000)][number]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": -1, "bandwidth": 1}, "latency: got -1, expected 0 or more seconds"),
        ({"latency": float("nan"), "bandwidth": 1}, "latency: got nan"),
        ({"latency": 0, "bandwidth": 0}, "bandwidth: got 0, expected bytes per second above 0"),
    ],
)
def test_links_that_cannot_be(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedLink(ThreadCommunicator.create(1)[0], **options)


@pytest.mark.parametrize("combine", ["exact", "fast"])
def test_a_layer_exchanges_no_more_than_it_must(combine: Any) -> None:
    """Each token once to a rank, and what comes back; beside it headers of a fixed size."""
    experts, inter, hidden, slots = 6, 16, 64, 3
    layer = draw_layer(np.random.default_rng(0), experts, inter, hidden)
    batches = [draw_batch(np.random.default_rng(rank), layer, 5 + 3 * rank, slots) for rank in range(3)]
    owner = np.arange(experts) // 2

    def rank(comm: Any) -> int:
        link = SimulatedLink(comm, latency=0, bandwidth=1e12)
        mine = picked(layer, experts_of("contiguous", experts, comm)).wrapper(slots)
        moe = ExpertParallel(mine, link, combine=combine)
        moe.forward(*batches[comm.rank])
        before = link.bytes_sent
        moe.forward(*batches[comm.rank])
        return link.bytes_sent - before

    def needed(me: int, batch: Batch, other: int) -> tuple[int, int]:
        """Bytes of a rank's tokens for another, and back."""
        there = (owner[batch.ids] == other).sum(axis=1)
        tokens, rows = int((there > 0).sum()), int(there.sum())
        ids, weights = 4 * slots, 4 * slots if combine == "fast" else 0
        return tokens * (2 * hidden + ids + weights), 4 * hidden * (rows if combine == "exact" else tokens)

    headers = 2 * (8 * 8 + 8)  # to each of two ranks: what is called, and whether all went well
    for me, sent in enumerate(on_ranks(3, rank)):
        others = [other for other in range(3) if other != me]
        out = sum(needed(me, batches[me], other)[0] for other in others)
        back = sum(needed(other, batches[other], me)[1] for other in others)
        assert sent == out + back + headers
