"""Scripts that use CUDA streams, each in a process whose driver needs no GPU."""

from __future__ import annotations

import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
from layers import run_python

__all__ = ["build_driver", "run"]

#: What the scripts begin with: a layer, a batch on the host and on the device, the result of the former.
BEGIN = """
import gc, numpy as np, time
from fake_cuda import DeviceArray, Stream, num_locked, num_locks
from layers import assert_same_bits, bf16, draw, draw_batch, draw_layer
from ktmoe_np import KExpertsCPUBuffer
from ktmoe_np import kt_kernel_ext as ext

rng = np.random.default_rng(0)
layer = draw_layer(rng, 5, 24, 40)
batch = draw_batch(rng, layer, 6, 2)
moe = layer.wrapper(2)
expected = moe.forward(*batch)
x, ids, w = map(DeviceArray, batch)
out = DeviceArray(np.zeros((6, 40), bf16))
stream = Stream()

def raised(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
"""


def build_driver(directory: Path) -> str:
    """The library, built there."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the driver with")
    library = directory / "libfake_cuda.so"
    source = Path(__file__).with_name("fake_cuda.cpp")
    options = ["-std=c++20", "-shared", "-fPIC", "-pthread", "-O1"]
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    return str(library)


def run(driver: str, *scripts: str, **env: str) -> str:
    """What scripts print, one after the other behind `BEGIN`; AssertionError when they raise."""
    script = "\n".join(map(textwrap.dedent, (BEGIN, *scripts)))
    done = run_python(script, env={"KTMOE_CUDA_DRIVER": driver, **env})
    assert done.returncode == 0, done.stderr
    return str(done.stdout)
