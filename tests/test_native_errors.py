"""Native encodings given wrongly: refusals say what came and what was expected, and change nothing."""

from __future__ import annotations

import doctest
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layers import assert_same_bits, bf16, draw_batch
from native_layers import METHODS, NativeLayer, draw_native_layer

import ktmoe_np._native
import ktmoe_np._native_formats
from ktmoe_np import KTMoEWrapper

E, I, H = 3, 48, 96  # noqa: E741
every_method = pytest.mark.parametrize("method", METHODS)


def native_layer(method: str, activation: str = "silu") -> NativeLayer:
    return draw_native_layer(np.random.default_rng(1), method, E, I, H, activation)


def assert_refused(
    method: str, changes: dict[str, Any], kind: type[Exception], message: str, activation: str = "silu"
) -> None:
    """With these arguments changed a layer keeps what it has: nothing, or the weights it was loaded with."""
    layer = native_layer(method, activation)
    for loaded in (False, True):
        moe = KTMoEWrapper(0, E, 2, H, I, method=method, activation=activation)
        batch = draw_batch(np.random.default_rng(2), layer, 5, 2)
        if loaded:
            layer.load_into(moe)
            before = moe.forward(*batch)
        with pytest.raises(kind, match=re.escape(message)):
            moe.load_weights_from_tensors(**{**layer.arguments, **changes})
        assert moe.loaded == loaded
        if loaded:
            assert_same_bits(moe.forward(*batch), before)


def test_doctests() -> None:
    for module in (ktmoe_np._native, ktmoe_np._native_formats):
        assert doctest.testmod(module).failed == 0


# What is wrong with an argument, for the method that has it.
WRONG = {
    "codes of another dtype": (
        "FP8",
        {"gate_proj": np.zeros((E, I, H), np.float32)},
        TypeError,
        "gate_proj: got float32 [3, 48, 96], expected float8_e4m3fn [3, 48, 96]",
    ),
    "codes of another width": (
        "MXFP4",
        {"up_proj": np.zeros((E, I, H), np.uint8)},
        ValueError,
        "up_proj: got uint8 [3, 48, 96], expected uint8 [3, 48, 48]",
    ),
    "packed codes of another width": (
        "RAWINT4",
        {"down_proj": np.zeros((E, H, 5), np.int32)},
        ValueError,
        "down_proj: got int32 [3, 96, 5], expected uint8 [3, 96, 24]",
    ),
    "another number of arrays": (
        "MXFP8",
        {"gate_proj": [np.zeros((I, H), np.uint8)] * 2},
        ValueError,
        "gate_proj: got 2 arrays, expected 3",
    ),
    "no array": ("FP8", {"down_proj": [1, 2, 3]}, TypeError, "down_proj: got int, expected an array"),
    "a last axis with gaps": (
        "FP8",
        {"gate_proj": np.zeros((E, I, 2 * H), np.uint8)[..., ::2]},
        TypeError,
        "gate_proj: the last axis has gaps, expected it contiguous",
    ),
    "no scale": ("FP8", {"gate_scale": None}, TypeError, "gate_scale: got NoneType, expected an array"),
    "a scale of another dtype": (
        "RAWINT4",
        {"up_scale": np.ones((E, I, H // 32), np.float32)},
        TypeError,
        "up_scale: got float32 [3, 48, 3], expected bfloat16 [3, 48, 3]",
    ),
    "a scale of another shape": (
        "FP8",
        {"down_scale": np.ones((E, 2, 1), np.float32)},
        ValueError,
        "down_scale: got float32 [3, 2, 1], expected float32 [3, 1, 1]",
    ),
    "scales of rows of another shape": (
        "FP8_PERCHANNEL",
        {"down_scale": np.ones((E, I), np.float32)},
        ValueError,
        "down_scale: got float32 [3, 48, 1], expected float32 [3, 96, 1]",
    ),
    "a scale of matrices where there is none": (
        "MXFP4",
        {"gate_global_scale": np.ones(E, np.float32)},
        ValueError,
        "gate_global_scale: got one, expected None: mxfp4 has no scale of a matrix",
    ),
    "a scale of matrices with a scale of rows": (
        "FP8_PERCHANNEL",
        {"gate_global_scale": np.ones(E, np.float32)},
        ValueError,
        "gate_global_scale: got one, expected None: fp8_perchannel has no scale of a matrix",
    ),
    "no scale of matrices": (
        "NVFP4",
        {"gate_global_scale": None},
        TypeError,
        "gate_global_scale: got NoneType, expected an array",
    ),
    "scales of matrices of another dtype": (
        "NVFP4",
        {"up_global_scale": np.ones(E)},
        TypeError,
        "up_global_scale: got float64, expected float32 [3]",
    ),
    "scales of matrices of another shape": (
        "NVFP4",
        {"up_global_scale": np.ones((E, 1), np.float32)},
        ValueError,
        "up_global_scale: got float32 [3, 1], expected float32 [3]",
    ),
    "a map beyond the experts": (
        "FP8",
        {"physical_to_logical_map": np.array([0, 1, 3])},
        IndexError,
        "physical_to_logical_map: got expert 3 at 2, expected 0 to 2",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_named(what: str) -> None:
    assert_refused(*WRONG[what])


@pytest.mark.parametrize("name", ["up_scale", "up_global_scale"])
def test_a_layer_without_a_gate_has_no_scale_of_up(name: str) -> None:
    message = f"{name}: got one, expected None: the activation is not gated"
    assert_refused("NVFP4", {name: np.ones(E, np.float32)}, ValueError, message, "relu2")


def test_a_layer_without_a_gate_has_no_up() -> None:
    codes = np.zeros((E, I, H), np.uint8)
    message = "up_proj: got one, expected None: the activation is not gated"
    assert_refused("FP8", {"up_proj": codes}, ValueError, message, "relu2")


#: The same bytes under other dtypes.
DTYPES = {
    "FP8": {"proj": (np.uint8, ml_dtypes.float8_e4m3fn)},
    "FP8_PERCHANNEL": {"proj": (np.uint8, ml_dtypes.float8_e4m3fn)},
    "MXFP8": {"proj": (np.uint8, ml_dtypes.float8_e4m3fn), "scale": (np.uint8, ml_dtypes.float8_e8m0fnu)},
    "RAWINT4": {"proj": (np.uint8, np.int32), "scale": (bf16,)},
    "MXFP4": {"proj": (np.uint8, np.int8), "scale": (np.uint8, ml_dtypes.float8_e8m0fnu)},
    "NVFP4": {"proj": (np.uint8, np.int8), "scale": (np.uint8, ml_dtypes.float8_e4m3fn)},
}


@every_method
@pytest.mark.parametrize("which", [0, 1])
def test_bytes_under_any_dtype_are_the_same_weights(method: str, which: int) -> None:
    layer = native_layer(method)
    batch = draw_batch(np.random.default_rng(3), layer, 5, 2)
    given = {}
    for name, array in layer.arguments.items():
        dtypes = DTYPES[method].get(name.partition("_")[2])
        given[name] = array if dtypes is None else list(array.view(dtypes[min(which, len(dtypes) - 1)]))
    moe = KTMoEWrapper(0, E, 2, H, I, method=method)
    moe.load_weights_from_tensors(**given)
    assert_same_bits(moe.forward(*batch), layer.forward(batch, method=method))
