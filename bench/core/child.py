"""A backend's process: `python -m bench.core.child FD` serves its parent's requests on the socket FD.

Being processes of their own, backends can differ in instruction set, threads and interpreter, and one that
crashes does not affect the others. The parent lets them run only while it waits for an answer.
"""

from __future__ import annotations

import contextlib
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

from ..peers import find_peer
from .cases import Case, make_cases
from .layer import Array, Layer
from .operations import OPERATIONS
from .reference import Sample
from .spec import Spec

__all__ = ["Server"]

_PR_SET_PDEATHSIG = 1


class Server:
    """Answers the requests; each public method is one."""

    def __init__(self) -> None:
        self._backend: Any = None
        self._next = 0

    def load(self, spec: Spec, fd: int) -> dict[str, Any]:
        """Make the backend and load the layer; says what it took."""
        self._spec = spec
        layer = Layer.attach(spec.shape, fd)
        peer = find_peer(spec.peer, spec.operation)
        for library in peer.LIBRARIES:
            importlib.import_module(library)
        before, start = _resident(), time.perf_counter()
        self._backend = peer.Backend(spec, layer)
        seconds, after = time.perf_counter() - start, _resident()
        self._unloaded = before["RssAnon"]
        phases = OPERATIONS[spec.operation].phases
        self._phases = [getattr(self._backend, phase.method) for phase in phases]
        return {
            **self._backend.about(),
            "python": sys.version.split()[0],
            "load_s": seconds,
            "load_bytes": sum(after.values()) - sum(before.values()),
        }

    def load_again(self) -> float:
        """Seconds of a load when all is warm."""
        return float(self._backend.load_again())

    def resident(self) -> dict[str, int]:
        """Bytes of this process in memory: its own, and of mapped files."""
        return _resident()

    def prepare(self, tokens: int) -> None:
        """Make the cases of a batch size."""
        self._cases: list[Case] = make_cases(self._spec.shape, tokens)
        self._backend.prepare(self._cases)
        self._next = 0
        self._last_s = 0.0

    def check(self, sample: Sample) -> dict[str, Array]:
        """Answer the first case; a part of that."""
        self._next = 0
        self._last_s = self._call()[-1]
        return sample.of(self._backend.answer())

    def memory(self) -> dict[str, int]:
        """Answer a case again, and give the bytes it takes: at the most, and what the backend documents.

        ``resident`` is the process's own memory in use at the peak that was not before the layer was loaded,
        without the cases.
        """
        _trim()
        cases = sum(array.nbytes for case in self._cases for array in case if array is not None)
        kept = _resident()["RssAnon"] - self._unloaded - cases
        documented: dict[str, int] = {}
        with _Peak() as peak:
            for phase in self._phases:
                phase(0)
                documented = documented or dict(self._backend.memory())
        return {"resident": kept + peak.growth, **documented}

    def turn(self, seconds: float) -> list[list[float]]:
        """Run for about that long, case after case; the seconds of each call, warming up not counted.

        Of a call that has phases, the seconds until the end of each of them.
        """
        begin = time.perf_counter()
        while self._last_s < seconds and time.perf_counter() - begin < 0.2 * seconds:
            self._call()
        samples: list[list[float]] = []
        gc.disable()
        begin = time.perf_counter()
        while not samples or time.perf_counter() - begin < seconds:
            samples.append(self._call())
        gc.enable()
        return samples

    def limits(self, seconds: float) -> dict[str, Any]:
        """Measure the machine."""
        limits: dict[str, Any] = self._backend.limits(seconds)
        return limits

    def _call(self) -> list[float]:
        i = self._next
        self._next = (i + 1) % len(self._cases)
        seconds = []
        start = time.perf_counter()
        for phase in self._phases:
            phase(i)
            seconds.append(time.perf_counter() - start)
        self._last_s = seconds[-1]
        return seconds


class _Peak:
    """How much the memory of this process grew at the most while a block ran, bytes."""

    def __enter__(self) -> _Peak:
        with contextlib.suppress(OSError):  # where it is not allowed, the peak is of the whole life
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS", "VmHWM")
        return self

    def __exit__(self, *_: object) -> None:
        after = _status("VmRSS", "VmHWM")
        rose = after["VmHWM"] > self._before["VmHWM"]
        self.growth = max(0, after["VmHWM" if rose else "VmRSS"] - self._before["VmRSS"])


def _resident() -> dict[str, int]:
    """Read RssAnon and RssFile of this process, bytes; the shared weights given to it are in neither."""
    return _status("RssAnon", "RssFile")


def _status(*names: str) -> dict[str, int]:
    """Read sizes of this process, bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    pairs = [line.split(":") for line in status if line.startswith(names)]
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _trim() -> None:
    """Give freed memory back, so that what is resident is in use."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)


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
        del answer  # its arrays would count as the backend's memory
    os._exit(0)  # some peers do not end their threads


if __name__ == "__main__":
    main()
