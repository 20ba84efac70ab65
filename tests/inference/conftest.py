"""A small layer for tests of the extension itself, whose files may have their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from layers import Batch, Layer, draw_batch, draw_layer
from low_level_sizes import E, H, I, P, T

from ktmoe_np import kt_kernel_ext as ext


@pytest.fixture(scope="module")
def layer() -> Layer:
    return draw_layer(np.random.default_rng(0), E, I, H)


@pytest.fixture(scope="module")
def batch(layer: Layer) -> Batch:
    return draw_batch(np.random.default_rng(1), layer, T, P)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    made = ext.CPUInfer(2)
    yield made
    made.shutdown()
