"""A contender's process: `python -m bench.child FD` serves its parent's requests on the socket FD.

Being processes of their own, contenders can differ in instruction set, threads and interpreter, and one that
crashes takes nobody along. The parent lets them run only while it waits for an answer.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .cases import Case, make_cases
from .layer import Array, Layer
from .peers import find_peer
from .spec import Spec

__all__ = ["Server"]

_PR_SET_PDEATHSIG = 1


class Server:
    """Answers the requests; each public method is one."""

    def __init__(self) -> None:
        self._contender: Any = None
        self._next = 0

    def load(self, spec: Spec, fd: int) -> dict[str, Any]:
        """Make the contender and load the layer; says what it took."""
        self._spec = spec
        layer = Layer.attach(spec.shape, fd)
        peer = find_peer(spec.peer)
        for library in peer.LIBRARIES:
            importlib.import_module(library)
        before, start = _resident(), time.perf_counter()
        self._contender = peer.Contender(spec, layer)
        seconds, after = time.perf_counter() - start, _resident()
        return {
            **self._contender.about(),
            "python": sys.version.split()[0],
            "load_s": seconds,
            "load_bytes": sum(after.values()) - sum(before.values()),
        }

    def load_again(self) -> float:
        """Seconds of a load when all is warm."""
        return float(self._contender.load_again())

    def resident(self) -> dict[str, int]:
        """Bytes of this process in memory: its own, and of mapped files."""
        return _resident()

    def prepare(self, tokens: int) -> None:
        """Make the cases of a batch size."""
        self._cases: list[Case] = make_cases(self._spec.shape, tokens)
        self._contender.prepare(self._cases)
        self._next = 0
        self._last_s = 0.0

    def check(self, rows: Array) -> Array:
        """Rows of the answer to the first case."""
        start = time.perf_counter()
        self._contender.run(0)
        self._last_s = time.perf_counter() - start
        out: Array = self._contender.output()[rows]
        return out

    def turn(self, seconds: float) -> list[float]:
        """Run for about that long, case after case; the seconds of each call, warming up not counted."""
        begin = time.perf_counter()
        while self._last_s < seconds and time.perf_counter() - begin < 0.2 * seconds:
            self._call()
        samples: list[float] = []
        gc.disable()
        begin = time.perf_counter()
        while not samples or time.perf_counter() - begin < seconds:
            samples.append(self._call())
        gc.enable()
        return samples

    def limits(self, seconds: float) -> dict[str, Any]:
        """Measure the machine."""
        limits: dict[str, Any] = self._contender.limits(seconds)
        return limits

    def _call(self) -> float:
        i = self._next
        self._next = (i + 1) % len(self._cases)
        start = time.perf_counter()
        self._contender.run(i)
        self._last_s = time.perf_counter() - start
        return self._last_s


def _resident() -> dict[str, int]:
    """Read RssAnon and RssFile of this process, bytes; the shared weights given to it are in neither."""
    status = Path("/proc/self/status").read_text().splitlines()
    pairs = [line.split(":") for line in status if line.startswith(("RssAnon", "RssFile"))]
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    connection = Connection(int(sys.argv[1]))
    server = Server()
    while True:
        try:
            request, *args = connection.recv()
        except EOFError:
            break
        try:
            answer = ("ok", getattr(server, request)(*args))
        except Exception as error:  # whatever a peer raises is its result
            answer = ("error", f"{type(error).__name__}: {error}")
        connection.send(answer)
    os._exit(0)  # some peers do not end their threads


if __name__ == "__main__":
    main()
