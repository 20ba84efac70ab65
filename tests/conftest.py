"""How hard the property tests search: KTMOE_HYPOTHESIS_PROFILE is dev (the default), ci or short."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
from converted import source, target  # noqa: F401  (fixtures)
from fake_cuda_runs import build_driver
from hypothesis import settings
from layers import POOLS, engine_of

from ktmoe_np.cpuinfer import _MoEBase

# Programs of JAX are for the CPU, also where there is a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# No deadlines: a machine that is shared or emulated is no error.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("short", deadline=None, derandomize=True, max_examples=5)
settings.load_profile(os.environ.get("KTMOE_HYPOTHESIS_PROFILE", "dev"))


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
