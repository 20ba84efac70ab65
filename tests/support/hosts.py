"""Hosts that are network namespaces of this machine: names, addresses and a wire of their own.

Ranks on them exchange by TCP over a wire of 1 Gbit/s. They share the file system, as hosts of a cluster do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mpi import Ended, mpi_command, run_job

__all__ = ["Hosts", "two_hosts"]

#: What MPI starts its daemons with instead of ssh: the last number of an address is that of the namespace.
_AGENT = """#!/bin/sh
number=${{1##*.}}
shift
exec ip netns exec {prefix}$number unshare --uts sh -c "hostname host$number; exec sh -c \\"\\$0\\"" "$*"
"""


class Hosts:
    """Two hosts with a rank each.

    Parameters
    ----------
    prefix : str
        Of the names of namespaces.
    folder : Path
        For files of the launcher.
    """

    def __init__(self, prefix: str, folder: Path) -> None:
        self._prefix = prefix
        self._agent = folder / "agent"
        self._agent.write_text(_AGENT.format(prefix=prefix))
        self._agent.chmod(0o755)
        self._folder = folder

    def run(self, script: str, timeout: float = 90.0) -> Ended:
        """Run a script by Python, a rank on each host; the launcher is on the first."""
        file = self._folder / "program.py"
        file.write_text(script)
        network = ["--mca", "oob_tcp_if_include", "eth0", "--mca", "btl_tcp_if_include", "eth0"]
        command = [
            *("ip", "netns", "exec", f"{self._prefix}1", "unshare", "--uts"),
            *("sh", "-c", 'hostname host1; exec "$@"', "sh"),
            *("mpiexec", "--allow-run-as-root", "--bind-to", "none"),
            *("--mca", "plm", "rsh", "--mca", "plm_rsh_agent", str(self._agent)),
            *("--mca", "pml", "ob1", "--mca", "btl", "tcp,self", *network),
            *("-x", "PYTHONPATH", "-x", "KTMOE_ISA", "-x", "OPENBLAS_NUM_THREADS"),
            *("--host", "10.99.0.1:1,10.99.0.2:1", "-n", "2"),
            *(sys.executable, "-m", "mpi4py", str(file)),
        ]
        return run_job(command, timeout)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Set them up; skips the test where that cannot be done."""
    if "--oversubscribe" not in mpi_command(2):
        pytest.skip("mpiexec: not Open MPI's")
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if os.getuid() != 0 or missing:
        pytest.skip(f"network namespaces: need root, ip, tc and unshare; missing: {missing or 'root'}")
    prefix = f"kt{os.getpid() % 10_000}x"
    try:
        try:
            for command in _setup(prefix):
                subprocess.run(command.split(), capture_output=True, check=True)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces: {error.cmd}: {error.stderr.decode().strip()}")
        yield Hosts(prefix, folder)
    finally:
        for number in (1, 2):
            subprocess.run(["ip", "netns", "del", f"{prefix}{number}"], capture_output=True, check=False)


def _setup(prefix: str) -> Iterator[str]:
    first, second = f"{prefix}1", f"{prefix}2"
    yield f"ip netns add {first}"
    yield f"ip netns add {second}"
    yield f"ip link add {first} netns {first} type veth peer name {second} netns {second}"
    for number, name in ((1, first), (2, second)):
        yield f"ip -n {name} link set {name} name eth0"
        yield f"ip -n {name} addr add 10.99.0.{number}/24 dev eth0"
        yield f"ip -n {name} link set eth0 up"
        yield f"ip -n {name} link set lo up"
        yield f"ip netns exec {name} tc qdisc add dev eth0 root tbf rate 1gbit burst 256k latency 50ms"
