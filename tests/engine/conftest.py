"""The layer, batch and engine that tests of the engine share, by the low-level API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from layers import AnyArray, Batch, Layer, draw_batch, draw_layer, engine_of, low_level_moe
from low_level_sizes import E, H, I, P, T


@pytest.fixture(scope="module")
def layer() -> Layer:
    return draw_layer(np.random.default_rng(0), E, I, H)


@pytest.fixture(scope="module")
def batch(layer: Layer) -> Batch:
    return draw_batch(np.random.default_rng(1), layer, T, P)


@pytest.fixture(scope="module")
def expected(layer: Layer, batch: Batch) -> AnyArray:
    return layer.forward(batch)


@pytest.fixture
def engine() -> Iterator[Any]:
    made = engine_of(2)
    yield made
    made.shutdown()


@pytest.fixture
def moe(engine: Any, layer: Layer) -> Any:
    return low_level_moe(engine, layer, P)
