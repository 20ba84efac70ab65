"""Rows with an odd number of nibbles: the last nibble of a row is ignored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from layers import AnyArray, assert_same_bits, bf16

from ktmoe_np import KTMoEWrapper

pytestmark = [pytest.mark.kernels, pytest.mark.asan]

E, H, I = 2, 33, 35  # noqa: E741

#: Method -> scales of a matrix [N, ..] for K columns, as large as they may be.
SCALES: dict[str, Any] = {
    "RAWINT4": lambda n, k: {"scale": np.full((E, n, -(-k // 32)), 2.0**126, bf16)},
    "MXFP4": lambda n, k: {"scale": np.full((E, n, -(-k // 32)), 254, np.uint8)},
    "NVFP4": lambda n, k: {
        "scale": np.full((E, n, -(-k // 16)), 0x7E, np.uint8),
        "global_scale": np.full(E, 2.0**118, np.float32),
    },
}
#: Method -> the nibble of zero.
ZERO = {"RAWINT4": 8, "MXFP4": 0, "NVFP4": 0}


def layer(method: str, mode: str, unused: int) -> Any:
    """Every weight is zero but one of each row, and that nibble stands where no weight is."""
    zero = ZERO[method]
    arguments: dict[str, AnyArray] = {}
    for name, (n, k) in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items():
        nibbles = np.full((E, n, k + 1), zero, np.uint8)
        nibbles[:, :, k - 1] = zero + 1
        nibbles[:, :, k] = unused
        arguments[f"{name}_proj"] = nibbles[:, :, ::2] | nibbles[:, :, 1::2] << 4
        arguments |= {f"{name}_{what}": array for what, array in SCALES[method](n, k).items()}
    suffix = "_SFT" if mode == "sft" else ""
    moe = KTMoEWrapper(0, E, 1, H, I, mode=mode, method=method + suffix, activation="gelu")
    moe.load_weights_from_tensors(**arguments)
    return moe


@pytest.mark.parametrize("mode", ["inference", "sft"])
@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_the_unused_nibble_changes_nothing(method: str, mode: str, num_tokens: int) -> None:
    x = np.full((num_tokens, H), 2.0**-126, bf16)
    batch = (x, np.arange(num_tokens)[:, None] % E, np.full((num_tokens, 1), 2.0**-100, np.float32))
    results = []
    for unused in range(16):
        moe = layer(method, mode, unused)
        results.append([moe.forward(*batch)])
        if mode == "sft":
            moe.forward_sft(*batch)
            results[-1].append(moe.backward(np.full((num_tokens, H), 2.0**-120, bf16)).grad_input)
    assert np.isfinite(results[0][0].astype(np.float32)).all()
    for other in results[1:]:
        for one, first in zip(other, results[0], strict=True):
            assert_same_bits(one, first)
