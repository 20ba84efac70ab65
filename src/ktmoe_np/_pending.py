"""A pass that was submitted and not yet waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from . import kt_kernel_ext as ext

__all__ = ["PendingPass"]

Result = TypeVar("Result")


class PendingPass(Generic[Result]):
    """The passes of one kind that a layer begins with submit_* and ends with sync_*: at most one at a time.

    Parameters
    ----------
    name : str
        What follows submit_ and sync_.
    layer_idx : int
        The layer, for messages.
    engine : ext.CPUInfer
        The engine that runs them.
    """

    def __init__(self, name: str, layer_idx: int, engine: ext.CPUInfer) -> None:
        self._name = name
        self._layer_idx = layer_idx
        self._engine = engine
        self._lock = threading.Lock()
        self._started: tuple[Result, list[int]] | None = None

    def submit(self, start: Callable[[], tuple[Result, list[int]]]) -> None:
        """Begin a pass: `start` queues it and gives its result and the tickets to wait for.

        Raises
        ------
        RuntimeError
            A pass is pending.
        """
        name = self._name
        with self._lock:
            if self._started is not None:
                raise RuntimeError(
                    f"submit_{name}: a pass of layer {self._layer_idx} is pending, call sync_{name} first"
                )
            self._started = start()

    def sync(self) -> Result:
        """Wait for the pass and give its result, or raise the first exception of its tasks.

        Raises
        ------
        RuntimeError
            None is pending.
        """
        name, started = self._name, self._started
        if started is None:
            raise RuntimeError(
                f"sync_{name}: no pass of layer {self._layer_idx} is pending, call submit_{name} first"
            )
        result, tickets = started
        errors = []
        for ticket in tickets:
            try:
                self._engine.wait(ticket)
            except Exception as error:
                errors.append(error)
        with self._lock:  # not before: after Ctrl-C the pass can still be waited for
            if self._started is started:
                self._started = None
        if errors:
            raise errors[0]
        return result
