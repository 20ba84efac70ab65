"""Handling of Ctrl-C in the process of the command. Imports almost nothing, to take effect early."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType, TracebackType

__all__ = ["EXIT_STATUS", "INTERRUPTED", "RaisingInterrupts", "guard_process"]

#: What is said after Ctrl-C, and the exit status.
INTERRUPTED, EXIT_STATUS = "ktmoe: interrupted", 130

_STANDARD_ERROR = 2

#: Seconds after which a signal that came during an import comes again.
_AGAIN = 0.005


class _Guard:
    """The process's handler of SIGINT.

    While `raises` is set, the first signal is a KeyboardInterrupt, so that what the command would leave
    behind is cleared away. At any other time (while the command is imported; while a first one is dealt with;
    at the end of the process) nothing has to be cleared away, and the process ends at once.

    An import may swallow the exception, and NumPy imports modules of its own when they are first used. Then
    the signal waits until the import is over: an alarm brings it again.
    """

    def __init__(self) -> None:
        self.raises = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.raises:
            if _is_importing(frame):
                signal.setitimer(signal.ITIMER_REAL, _AGAIN)
                return
            self.raises = False
            raise KeyboardInterrupt
        try:
            os.write(_STANDARD_ERROR, f"{INTERRUPTED}\n".encode())
        finally:
            os._exit(EXIT_STATUS)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a frame belongs to an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


_guard = _Guard()


def guard_process() -> None:
    """Have SIGINT end the process with one line, unless it is ignored or handled otherwise."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # not in the main thread, which alone handles signals
            signal.signal(signal.SIGALRM, _guard)
            signal.signal(signal.SIGINT, _guard)


class RaisingInterrupts:
    """Within it SIGINT raises KeyboardInterrupt, once, in a process that is guarded. A context manager."""

    def __enter__(self) -> None:
        _guard.raises = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _guard.raises = False
