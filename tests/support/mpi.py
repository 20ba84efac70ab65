"""Programs of several ranks under mpiexec."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from layers import ISA

import ktmoe_np

__all__ = ["Ended", "layer_script", "mpi_command", "rank_environment", "run_job", "run_ranks"]

#: What scripts of ranks begin with: a layer, and the part of a rank.
_HEAD = """
import numpy as np, os, signal, sys, time
from mpi4py import MPI
from layers import assert_same_bits, draw_layer
from ranks import experts_of, picked
from ktmoe_np.distributed import ExpertParallel, ExpertParallelSFT, RankError
comm = MPI.COMM_WORLD
E, I, H, P = 6, 33, 64, 2
rng = np.random.default_rng(0)
layer = draw_layer(rng, E, I, H)
def batch(rank, tokens):
    from layers import draw_batch
    return draw_batch(np.random.default_rng(rank), layer, tokens, P)
def parallel(**options):
    placement = options.get("placement", "contiguous")
    moe = picked(layer, experts_of(placement, E, comm)).wrapper(P, cpuinfer_threads=1)
    return ExpertParallel(moe, comm, **options)
"""


class Ended(NamedTuple):
    """How a job ended."""

    returncode: int
    stdout: str
    stderr: str


def layer_script(body: str) -> str:
    """A script of ranks that have a layer's experts."""
    return _HEAD + body


@cache
def _mpi_version() -> str:
    """What mpiexec says it is; skips the test without it, or without mpi4py."""
    pytest.importorskip("mpi4py")
    if shutil.which("mpiexec") is None:
        pytest.skip("mpiexec: not installed")
    return subprocess.run(
        ["mpiexec", "--version"], capture_output=True, text=True, timeout=60, check=False
    ).stdout


def mpi_command(num_ranks: int) -> list[str]:
    """The beginning of a command: ranks that share the processors and leave them while they wait."""
    if "Open MPI" not in _mpi_version() and "OpenRTE" not in _mpi_version():
        return ["mpiexec", "-n", str(num_ranks)]
    options = ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
    if os.getuid() == 0:
        options.append("--allow-run-as-root")
    return ["mpiexec", *options, "-n", str(num_ranks)]


def rank_environment(**more: str) -> dict[str, str]:
    """The environment of ranks: the tests' own package, and one thread for the products of NumPy."""
    tests = os.path.dirname(os.path.abspath(__file__))
    source = os.path.dirname(os.path.dirname(os.path.abspath(ktmoe_np.__file__)))
    path = os.pathsep.join([tests, source, *filter(None, [os.environ.get("PYTHONPATH")])])
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "KTMOE_ISA": ISA}
    return {**os.environ, **one_thread, "PYTHONPATH": path, **more}


def run_ranks(
    num_ranks: int, script: str, *args: str, folder: Path, timeout: float = 90.0, runner: tuple[str, ...] = ()
) -> Ended:
    """Run a script, indented or not, on so many ranks; all are ended when it takes too long.

    `runner` is what Python runs the file with, by default mpi4py, which ends the job at an exception that
    nobody catches; give ("",) for nothing.
    """
    file = folder / "program.py"
    file.write_text(textwrap.dedent(script))
    with_runner = [part for part in (runner or ("-m", "mpi4py")) if part]
    return run_job([*mpi_command(num_ranks), sys.executable, *with_runner, str(file), *args], timeout)


def run_job(command: list[str], timeout: float = 90.0) -> Ended:
    """Run a command under mpiexec."""
    with subprocess.Popen(
        command,
        env=rank_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        try:
            stdout, stderr = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            stdout, stderr = job.communicate()
            pytest.fail(f"ranks took longer than {timeout:g} s:\n{stdout}\n{stderr}")
    return Ended(job.returncode, stdout, stderr)
