"""Ctrl-C that ends a loop between its steps instead of anywhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from .terminal import complain

__all__ = ["Interrupts"]


class Interrupts:
    """Within it a first interrupt only sets `asked`, and says so; a second one is as it is without.

    A context manager.

    Nothing is changed outside the main thread, or where interrupts are ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Callable[[int, FrameType | None], object] | None = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()
        complain("stopping in a moment; once more to stop at once")

    def _restore(self) -> None:
        before, self._before = self._before, None
        if before is not None:
            signal.signal(signal.SIGINT, before)

    def __enter__(self) -> Interrupts:
        before = signal.getsignal(signal.SIGINT)
        if callable(before) and threading.current_thread() is threading.main_thread():
            self._before = before
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
