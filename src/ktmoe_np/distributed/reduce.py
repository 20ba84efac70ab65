"""Sums over replicas of a model, each of which has all experts, in the order of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.host import to_write
from .channel import Channel, RankError, attempt

__all__ = ["reduce_gradients"]


def reduce_gradients(
    gradients: Mapping[str, NDArray[np.float32]], comm: object, *, timeout: float = 300.0
) -> None:
    """Replace gradients by their sum over all ranks, ((g0 + g1) + g2) + ..; collective.

    For data-parallel training: every rank has the whole layer and a batch of its own. The order of the sum is
    that of ranks, not one that MPI chooses: all ranks have the same bits, and every run has them. Each rank
    sums a part of all numbers, so it sends and receives twice their bytes, whatever the number of ranks.

    Parameters
    ----------
    gradients : mapping of str to array of float32
        The same names and shapes on all ranks, `SFTGradients.matrices` for example. Overwritten.
    comm : communicator
        See `ExpertParallel`.
    timeout : float
        Seconds; see there.

    Raises
    ------
    RankError
        On all ranks: arrays of another kind, or other names or shapes on a rank. They are as they were.
    TimeoutError
        Not all ranks came.

    Examples
    --------
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> from ktmoe_np.distributed import ThreadCommunicator, reduce_gradients
    >>> def rank(comm):
    ...     gradients = {"gate_lora_a": np.full(3, 1 + comm.rank, np.float32)}
    ...     reduce_gradients(gradients, comm)
    ...     return gradients["gate_lora_a"].tolist()
    >>> with ThreadPoolExecutor() as threads:
    ...     list(threads.map(rank, ThreadCommunicator.create(2)))
    [[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]]
    """
    channel = Channel.of(comm, timeout)
    arrays, error = attempt(lambda: {name: _checked(name, array) for name, array in gradients.items()})
    with channel.call():
        channel.agree("reduce_gradients", 0, error)
    assert arrays is not None
    shapes = repr({name: array.shape for name, array in arrays.items()})
    with channel.call():
        _check_same(channel, shapes)
        total = sum(array.size for array in arrays.values())
        own = np.concatenate([array.reshape(-1) for array in arrays.values()] or [np.empty(0, np.float32)])
        cuts = [total * rank // channel.size for rank in range(channel.size + 1)]
        sizes = np.diff(cuts).tolist()
        mine = sizes[channel.rank]
        parts = np.empty((channel.size, mine), np.float32)
        what = "gradients of other ranks"
        channel.wait(channel.begin(own, sizes, parts.reshape(-1), [mine] * channel.size), what)
        part = parts[0].copy()
        for other in parts[1:]:
            part += other
        sent = np.tile(part, channel.size)
        channel.wait(channel.begin(sent, [mine] * channel.size, own, sizes), what)
    begin = 0
    for array in arrays.values():
        array[...] = own[begin : begin + array.size].reshape(array.shape)
        begin += array.size


def _checked(name: str, array: Any) -> NDArray[np.float32]:
    found: NDArray[np.float32] = to_write(array, name)
    if found.dtype != np.float32:
        raise TypeError(f"{name}: got {found.dtype}, expected float32")
    return found


def _check_same(channel: Channel, shapes: str) -> None:
    """Raise on all ranks unless they have the same names and shapes."""
    told = [text.decode() for text in channel.gather(shapes.encode())]
    for rank, text in enumerate(told):
        if text != told[0]:
            raise RankError(f"gradients: got {text} on rank {rank}, expected {told[0]} as on rank 0")
