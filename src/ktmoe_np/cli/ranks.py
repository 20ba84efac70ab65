"""The ranks of the MPI job that the command runs on: ``mpiexec -n N python -m mpi4py -m ktmoe_np.cli ...``.

Without ``-m mpi4py``, or with one rank, there is no job, and MPI is not initialized. Imports nothing heavy.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from typing import Any

__all__ = ["check_cpus", "communicator", "is_first", "prepare_environment", "rank_prefix"]


def communicator() -> Any:
    """The communicator of all ranks; None where there are no others."""
    if "mpi4py" not in sys.modules:
        return None
    world = importlib.import_module("mpi4py.MPI").COMM_WORLD
    return world if world.Get_size() > 1 else None


def is_first() -> bool:
    """Whether this process speaks for the job."""
    comm = communicator()
    return comm is None or comm.Get_rank() == 0


def rank_prefix() -> str:
    """What messages of other ranks than the first begin with."""
    return "" if is_first() else f"rank {communicator().Get_rank()}: "


def prepare_environment() -> None:
    """Have NumPy multiply with one thread on ranks, before it is imported: results depend on the number."""
    if communicator() is not None:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def check_cpus() -> str | None:
    """A warning if ranks of one host may use the same processors. Collective."""
    comm = communicator()
    if comm is None:
        return None
    all_ranks = comm.allgather((socket.gethostname(), sorted(os.sched_getaffinity(0))))
    for rank, (host, cpus) in enumerate(all_ranks):
        for other in range(rank):
            shared = set(cpus) & set(all_ranks[other][1])
            if all_ranks[other][0] == host and shared:
                return (
                    f"ranks {other} and {rank} may both use {len(shared)} processors of {host}: bind ranks "
                    "to different ones (Open MPI: --map-by numa --bind-to numa), or give --threads"
                )
    return None
