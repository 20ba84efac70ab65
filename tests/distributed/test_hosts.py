"""Ranks on several hosts, for real: other names, TCP alone, and a wire of 1 Gbit/s."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hosts import two_hosts
from mpi import layer_script

pytestmark = [pytest.mark.mpi, pytest.mark.subprocess]


def test_layers(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as hosts:
        ended = hosts.run(
            layer_script("""
import socket
moe = parallel(slice_tokens=300)
for tokens in (1, 700):
    mine = batch(comm.rank, tokens)
    assert_same_bits(moe.forward(*mine), layer.forward(mine))
print(socket.gethostname())
""")
        )
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.split()) == ["host1", "host2"]


def test_a_host_that_fails(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as hosts:
        began = time.monotonic()
        ended = hosts.run(
            layer_script("""
moe = parallel()
moe.forward(*batch(comm.rank, 3))
if comm.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
moe.forward(*batch(comm.rank, 3))
""")
        )
    assert ended.returncode != 0
    assert time.monotonic() - began < 30
