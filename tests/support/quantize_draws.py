"""Random weights for quantization, at every size that a format can represent."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st
from reference_cases import AnyArray, bf16

from ktmoe_np.reference import quantize_int8

f32 = np.float32
LARGEST = 2.0**128 - 2.0**120
SEEDS = st.integers(0, 2**32 - 1)
#: Columns: groups filled, short, one column, odd.
COLUMNS = st.sampled_from([1, 2, 15, 31, 32, 33, 64, 77, 100, 128, 129, 200])
#: Powers of two by which weights are scaled: denormal numbers up to the largest.
POWERS = st.integers(-140, 127)
in_groups = partial(quantize_int8, group_size=32)


def draw(seed: int, *shape: int, power: int = 0, dtype: Any = bf16) -> AnyArray:
    """Normal weights times a power of two, at most the largest; a few rows of zeros."""
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.standard_normal(shape), power)
    values[rng.random(shape[:-1]) < 0.1] = 0
    limit = LARGEST if dtype is not np.float16 else 65504.0
    return np.clip(values, -limit, limit).astype(f32).astype(dtype)


def nibbles(seed: int, *shape: int) -> AnyArray:
    return np.random.default_rng(seed).integers(-8, 8, shape).astype(np.int8)
