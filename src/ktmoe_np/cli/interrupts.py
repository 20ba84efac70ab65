"""Ctrl-C that ends a loop between its steps instead of anywhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from .terminal import complain

__all__ = ["Interrupts"]


class Interrupts:
    """Within it the first interrupt only sets `requested` and prints so; a second one interrupts as usual.

    A context manager.

    Nothing is changed outside the main thread, or where interrupts are ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Callable[[int, FrameType | None], object] | None = None

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        complain("stopping after this step; press Ctrl-C again to stop now")

    def _restore(self) -> None:
        before, self._before = self._before, None
        if before is not None:
            signal.signal(signal.SIGINT, before)

    def __enter__(self) -> Interrupts:
        before = signal.getsignal(signal.SIGINT)
        if callable(before) and threading.current_thread() is threading.main_thread():
            self._before = before
            signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
