"""The parent's end of a backend's process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from .spec import Spec

__all__ = ["LOAD_TIMEOUT", "BackendError", "BackendProcess"]

#: Seconds that loading a layer may take.
LOAD_TIMEOUT = 300.0

_ROOT = Path(__file__).resolve().parents[2]


class BackendError(Exception):
    """A backend raised, crashed or hung."""


class BackendProcess:
    """A backend in its process, which is stopped (SIGSTOP) whenever it has nothing to answer.

    So waiting threads take no time from the process that is being timed, however they wait.
    """

    def __init__(self, spec: Spec, fd: int) -> None:
        self.spec, self.facts = spec, {}  # type: Spec, dict[str, Any]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [spec.python or sys.executable, "-m", f"{__package__}.child", str(theirs.fileno())],
            cwd=_ROOT,
            env=_environment(spec),
            pass_fds=(theirs.fileno(), fd),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        theirs.close()

    def ask(self, request: str, *args: Any, timeout: float = 120.0) -> Any:
        """Let the process run until it has answered.

        Raises
        ------
        BackendError
            It raised, ended or did not answer in time; in the last two cases it is gone.
        """
        self._signal(signal.SIGCONT)
        try:
            self._connection.send((request, *args))
            if not self._connection.poll(timeout):
                self.stop()
                raise BackendError(f"no answer to {request} in {timeout:.0f} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise BackendError(f"ended in {request}: {self._end()}") from error
        self._signal(signal.SIGSTOP)
        if kind == "error":
            raise BackendError(value)
        return value

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def close(self) -> None:
        """End the process and forget what it said."""
        self.stop()
        self._log.close()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, number)

    def _end(self) -> str:
        """Why the process ended, with the last it said."""
        code = self._process.wait()
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f"{reason}, {said[-1][:200]}" if said else reason


def _environment(spec: Spec) -> dict[str, str]:
    environment = dict(os.environ)
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(path).resolve()) for path in paths if path)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = str(spec.threads)
    environment.pop("KTMOE_ISA", None)
    if spec.isa:
        environment["KTMOE_ISA"] = spec.isa
    return environment
