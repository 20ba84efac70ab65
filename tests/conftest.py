"""What all tests share: how hard property tests search, fixtures, and which tests may run beside others.

KTMOE_HYPOTHESIS_PROFILE is dev (the default), ci or short.
"""

from __future__ import annotations

import gc
import os

# Set before NumPy is imported: idle threads of its BLAS spin on the processors that other workers need.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import re
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from converted import source, target  # noqa: F401  (fixtures)
from fake_cuda_runs import build_driver
from hypothesis import settings
from layers import POOLS, engine_of
from worker_turns import (  # noqa: F401  (hooks of pytest)
    pytest_configure,
    pytest_configure_node,
    pytest_runtest_protocol,
    pytest_unconfigure,
    pytest_xdist_make_scheduler,
)

from ktmoe_np.cpuinfer import _MoEBase

# Programs of JAX are for the CPU, also where there is a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# No deadlines: a machine that is shared or emulated is no error.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("short", deadline=None, derandomize=True, max_examples=5)
settings.load_profile(os.environ.get("KTMOE_HYPOTHESIS_PROFILE", "dev"))


#: What tests marked `crosscheck` compare with, and the extra `test` does not install.
_OTHERS = re.compile(
    "could not import '(?:torch|transformers|tokenizers|jax|optax|peft|compressed_tensors|neural_compressor)"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that is skipped without torch, say, and not marked `crosscheck`: it would never be run."""
    report = yield
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    if _OTHERS.search(reason) and item.get_closest_marker("crosscheck") is None:
        report.outcome = "failed"
        report.longrepr = f"{reason}: expected the marker crosscheck"
    return report


def pytest_collection_finish() -> None:
    """Exempt the collected tests from garbage collection: they are many, and some tests collect often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Any]]:
    """An engine for each of `POOLS`."""
    made = [engine_of(*pool) for pool in POOLS]
    yield made
    for engine in made:
        engine.shutdown()


@pytest.fixture(scope="module")
def leave_no_engine() -> Iterator[None]:
    """For modules whose commands make the engine: the next one may ask for another."""
    yield
    gc.collect()
    if not _MoEBase._loaded:
        _MoEBase.reset_cpu_infer()


@pytest.fixture(scope="session")
def cuda_driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CUDA driver that needs no GPU: its library, for KTMOE_CUDA_DRIVER."""
    return build_driver(tmp_path_factory.mktemp("cuda"))
