"""Ctrl-C that ends a loop between its steps instead of anywhere."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType

__all__ = ["Interrupts"]


class Interrupts:
    """Within it a first interrupt only sets `asked`, and says so; a second one is as it is without.

    A context manager.

    Nothing is changed outside the main thread, or where interrupts are ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self._ours = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        sys.stderr.write("\nstopping in a moment; once more to stop at once\n")
        self._restore()

    def _restore(self) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._ours = False

    def __enter__(self) -> Interrupts:
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._ask)
            self._ours = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
