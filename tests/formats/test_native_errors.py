"""Native encodings given wrongly: refusals say what came and what was expected, and change nothing."""

from __future__ import annotations

import doctest
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layers import assert_same_bits, bf16, draw_batch, draw_layer
from native_layers import IN_PLACE, NativeLayer, draw_native_layer
from native_layers import WITH_SCALES as METHODS

import ktmoe_np.formats.encodings
import ktmoe_np.formats.methods
import ktmoe_np.layers.native
from ktmoe_np import KTMoEWrapper

E, I, H = 3, 64, 96  # noqa: E741
every_method = pytest.mark.parametrize("method", METHODS)

NO_ARRAY = "got NoneType, expected an array on the CPU (NumPy, or with __dlpack__)"


#: Expected dtypes of codes and scales, and how many columns of codes share a scale; None: a row. Not of
#: methods that convert what they are given.
EXPECTED: dict[str, tuple[str, str, int | None]] = {
    "FP8": ("float8_e4m3fn", "float32", 128),
    "FP8_PERCHANNEL": ("float8_e4m3fn", "float32", None),
    "MXFP8": ("float8_e4m3fn", "uint8", 32),
    "RAWINT4": ("uint8", "bfloat16", 32),
    "MXFP4": ("uint8", "uint8", 32),
    "NVFP4": ("uint8", "float8_e4m3fn", 16),
}


def expected(method: str, name: str) -> str:
    """The requirement in the message about an argument."""
    rows, columns = (H, I) if name.startswith("down") else (I, H)
    if method == "GPTQ_INT4":
        if name.endswith("_proj"):
            return f"int32 {[E, columns // 8, rows]}"
        return f"float16 [{E}, G, {rows}] with G = {'2 or 1' if columns == 64 else '3 or 2 or 1'}"
    if method == "INT4_ZP":
        if name.endswith("_proj"):
            return f"uint8 {[E, rows, columns // 2]}"
        return f"float16 [{E}, {rows}, G] with G = {'2 or 1' if columns == 64 else '3 or 2 or 1'}"
    codes, scale, group = EXPECTED[method]
    if name.endswith("_proj"):
        return f"{codes} {[E, rows, columns if codes != 'uint8' else columns // 2]}"
    shared = 128 if method == "FP8" else 1
    return f"{scale} {[E, -(-rows // shared), -(-columns // (group or columns))]}"


def got(method: str, name: str, array: Any) -> str:
    """How a message calls an array; scales of rows are looked at as columns."""
    as_column = [1] if method == "FP8_PERCHANNEL" and name.endswith("_scale") else []
    return f"{array.dtype} {[*array.shape, *as_column]}"


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
        with pytest.raises(kind, match=f"^{re.escape(message)}$"):
            moe.load_weights_from_tensors(**{**layer.arguments, **changes})
        assert moe.loaded == loaded
        if loaded:
            assert_same_bits(moe.forward(*batch), before)


def assert_same_weights(method: str, arguments: dict[str, Any]) -> None:
    """A layer given these computes the same bits as `native_layer`."""
    layer = native_layer(method)
    batch = draw_batch(np.random.default_rng(3), layer, 5, 2)
    moe = KTMoEWrapper(0, E, 2, H, I, method=method)
    moe.load_weights_from_tensors(**arguments)
    assert_same_bits(moe.forward(*batch), layer.forward(batch, method=method))


def test_doctests() -> None:
    for module in (ktmoe_np.layers.native, ktmoe_np.formats.encodings, ktmoe_np.formats.methods):
        assert doctest.testmod(module).failed == 0


# ---- every argument of every method ----

arguments = pytest.mark.parametrize(
    "name", [f"{projection}_{role}" for projection in ("gate", "up", "down") for role in ("proj", "scale")]
)


@every_method
@arguments
def test_another_dtype_is_refused(method: str, name: str) -> None:
    array = native_layer(method).arguments[name].astype(np.float64)
    message = f"{name}: got {got(method, name, array)}, expected {expected(method, name)}"
    assert_refused(method, {name: array}, TypeError, message)


@every_method
@arguments
def test_another_shape_is_refused(method: str, name: str) -> None:
    array = native_layer(method).arguments[name]
    wider = np.concatenate(
        [array] * (8 if method == "INT4_ZP" else 2), axis=-1
    )  # more groups than there may be
    for wrong in (array[1:], array[:, :0], wider):
        message = f"{name}: got {got(method, name, wrong)}, expected {expected(method, name)}"
        assert_refused(method, {name: wrong}, ValueError, message)
    of_one = expected(method, name).replace(f"[{E}, ", "[")
    message = f"{name}: got {got(method, name, wider[0])}, expected {of_one}"
    assert_refused(method, {name: [*array[1:], wider[0]]}, ValueError, message)


@every_method
@arguments
def test_another_number_of_arrays_is_refused(method: str, name: str) -> None:
    arrays = list(native_layer(method).arguments[name])
    for wrong in ([], arrays[1:], (*arrays, arrays[0])):
        message = f"{name}: got {len(wrong)} arrays, expected {E}"
        assert_refused(method, {name: wrong}, ValueError, message)


@every_method
@arguments
def test_what_is_no_array_is_refused(method: str, name: str) -> None:
    arrays = list(native_layer(method).arguments[name])
    for wrong, where in ((None, name), ([*arrays[1:], None], f"{name}[{E - 1}]")):
        assert_refused(method, {name: wrong}, TypeError, f"{where}: {NO_ARRAY}")


@every_method
@arguments
def test_gaps_in_the_last_axis_are_refused_where_they_matter(method: str, name: str) -> None:
    layer = native_layer(method)
    apart = np.repeat(layer.arguments[name], 2, axis=-1)[..., ::2]
    if method not in IN_PLACE or (name.endswith("_scale") and method in ("FP8", "FP8_PERCHANNEL")):
        # What is converted may lie anyhow, one number has no gaps, and scales of rows are put together.
        assert_same_weights(method, {**layer.arguments, name: apart})
        return
    for source, array in ((apart, apart), (list(apart), apart[0])):
        message = f"{name}: got strides {list(array.strides)}, expected a contiguous last axis"
        assert_refused(method, {name: source}, TypeError, message)


of_every_projection = pytest.mark.parametrize(
    "name", [f"{projection}_global_scale" for projection in ("gate", "up", "down")]
)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "NVFP4"])
@of_every_projection
def test_only_nvfp4_has_scales_of_matrices(method: str, name: str) -> None:
    message = f"{name}: got one, expected None: {method.lower()} has no scale of a matrix"
    assert_refused(method, {name: np.ones(E, np.float32)}, ValueError, message)


@of_every_projection
def test_scales_of_matrices_that_are_wrong(name: str) -> None:
    ones = np.ones(E, np.float32)
    for what, value in (("NoneType", None), ("list", [1.0] * E), ("float", 1.0)):
        told = f"{name}: got {what}, expected an array on the CPU (NumPy, or with __dlpack__)"
        assert_refused("NVFP4", {name: value}, TypeError, told)
    for wrong in (ones[1:], ones[:, None], np.array(1, np.float32)):
        message = f"{name}: got float32 {list(wrong.shape)}, expected float32 [{E}]"
        assert_refused("NVFP4", {name: wrong}, ValueError, message)
    for dtype in (bf16, np.dtype(np.float64)):
        message = f"{name}: got {dtype}, expected float32 [{E}]"
        assert_refused("NVFP4", {name: ones.astype(dtype)}, TypeError, message)


@pytest.mark.parametrize("name", [f"{p}_{w}scale" for p in ("gate", "up", "down") for w in ("", "global_")])
def test_bfloat16_has_no_scales(name: str) -> None:
    layer = draw_layer(np.random.default_rng(4), E, I, H)
    batch, moe = draw_batch(np.random.default_rng(2), layer, 5, 2), KTMoEWrapper(0, E, 2, H, I, method="BF16")
    message = f"{name}: got one, expected None: bfloat16 weights have no scales"
    for loaded in (False, True):
        if loaded:
            layer.load_into(moe)
        with pytest.raises(ValueError, match=f"^{message}$"):
            moe.load_weights_from_tensors(*layer.matrices, **{name: np.ones(E, np.float32)})
        assert moe.loaded == loaded
    assert_same_bits(moe.forward(*batch), layer.forward(batch))


# ---- one by one ----

# What is wrong with an argument, for the method that has it.
WRONG: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "codes of another dtype": (
        "FP8",
        {"gate_proj": np.zeros((E, I, H), np.float32)},
        TypeError,
        "gate_proj: got float32 [3, 64, 96], expected float8_e4m3fn [3, 64, 96]; BF16, AMXINT8, AMXINT4, "
        "MOE_INT8, MOE_INT4 and LLAMAFILE take float32",
    ),
    "codes of another width": (
        "MXFP4",
        {"up_proj": np.zeros((E, I, H), np.uint8)},
        ValueError,
        "up_proj: got uint8 [3, 64, 96], expected uint8 [3, 64, 48]",
    ),
    "packed codes of another width": (
        "RAWINT4",
        {"down_proj": np.zeros((E, H, 5), np.int32)},
        ValueError,
        "down_proj: got int32 [3, 96, 5], expected uint8 [3, 96, 32]",
    ),
    "another number of arrays": (
        "MXFP8",
        {"gate_proj": [np.zeros((I, H), np.uint8)] * 2},
        ValueError,
        "gate_proj: got 2 arrays, expected 3",
    ),
    "no array": (
        "FP8",
        {"down_proj": [1, 2, 3]},
        TypeError,
        "down_proj[0]: got int, expected an array on the CPU (NumPy, or with __dlpack__)",
    ),
    "a last axis with gaps": (
        "FP8",
        {"gate_proj": np.zeros((E, I, 2 * H), np.uint8)[..., ::2]},
        TypeError,
        f"gate_proj: got strides [{2 * I * H}, {2 * H}, 2], expected a contiguous last axis",
    ),
    "no scale": ("FP8", {"gate_scale": None}, TypeError, f"gate_scale: {NO_ARRAY}"),
    "a scale of another dtype": (
        "RAWINT4",
        {"up_scale": np.ones((E, I, H // 32), np.float32)},
        TypeError,
        "up_scale: got float32 [3, 64, 3], expected bfloat16 [3, 64, 3]",
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
        "down_scale: got float32 [3, 64, 1], expected float32 [3, 96, 1]",
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
        f"gate_global_scale: {NO_ARRAY}",
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
    "a scale that float16 does not have": (
        "GPTQ_INT4",
        {"gate_scale": np.full((E, 3, I), 2.0**20, bf16)},
        ValueError,
        "gate_scale: got 1.04858e+06 in bfloat16, expected numbers that float16 has",
    ),
    "groups of 16": (
        "GPTQ_INT4",
        {"up_scale": np.ones((E, 6, I), np.float16)},
        ValueError,
        "up_scale: got float16 [3, 6, 64], expected float16 [3, G, 64] with G = 3 or 2 or 1",
    ),
    "GPTQ of eight bits": (
        "GPTQ_INT4",
        {"gate_proj": np.zeros((E, H // 4, I), np.int32)},
        ValueError,
        "gate_proj: got int32 [3, 24, 64], expected int32 [3, 12, 64]",
    ),
    "a map beyond the experts": (
        "FP8",
        {"physical_to_logical_map": np.array([0, 1, 3])},
        IndexError,
        "physical_to_logical_map: got expert 3 at 2, expected 0 to 2",
    ),
    "a map of another length": (
        "NVFP4",
        {"physical_to_logical_map": np.arange(2)},
        ValueError,
        "physical_to_logical_map: got int64 [2], expected int64 [3]",
    ),
    "a map of no integers": (
        "MXFP8",
        {"physical_to_logical_map": np.zeros(E)},
        TypeError,
        "physical_to_logical_map: got float64 [3], expected an integer dtype",
    ),
    "codes of signed bytes": (
        "FP8",
        {"gate_proj": np.zeros((E, I, H), np.int8)},
        TypeError,
        "gate_proj: got int8 [3, 64, 96], expected float8_e4m3fn [3, 64, 96]; MXFP4 and NVFP4 take int8",
    ),
    "powers of two where E4M3 are scales": (
        "NVFP4",
        {"gate_scale": np.zeros((E, I, H // 16), ml_dtypes.float8_e8m0fnu)},
        TypeError,
        "gate_scale: got float8_e8m0fnu [3, 64, 6], expected float8_e4m3fn [3, 64, 6]",
    ),
    "a bias of another shape": (
        "RAWINT4",
        {"down_bias": np.zeros((E, I), np.float32)},
        ValueError,
        "down_bias: got float32 [3, 64], expected float32 or bfloat16 [3, 96]",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_named(what: str) -> None:
    assert_refused(*WRONG[what])


@every_method
@pytest.mark.parametrize("name", ["up_proj", "up_scale", "up_global_scale"])
def test_a_layer_without_a_gate_has_no_up(method: str, name: str) -> None:
    given = native_layer(method).arguments.get(name, np.ones(E, np.float32))
    message = f"{name}: got one, expected None: the activation is not gated"
    assert_refused(method, {name: given}, ValueError, message, "relu2")


@every_method
def test_a_layer_for_training_refuses_alike(method: str) -> None:
    layer, name = native_layer(method), f"{method}_SFT"
    moe = layer.wrapper(2, mode="sft", method=name, lora_rank=0)
    batch = draw_batch(np.random.default_rng(2), layer, 5, 2)
    before = moe.forward_sft(*batch, save_for_backward=False)
    with pytest.raises(
        TypeError,
        match=r"^up_scale: got NoneType, expected an array on the CPU \(NumPy, or with __dlpack__\)$",
    ):
        moe.load_weights_from_tensors(**{**layer.arguments, "up_scale": None})
    assert_same_bits(moe.forward_sft(*batch, save_for_backward=False), before)


# ---- what is the same ----

#: The same bytes under other dtypes.
DTYPES = {
    "FP8": {"proj": (np.uint8, ml_dtypes.float8_e4m3fn)},
    "FP8_PERCHANNEL": {"proj": (np.uint8, ml_dtypes.float8_e4m3fn)},
    "MXFP8": {"proj": (np.uint8, ml_dtypes.float8_e4m3fn), "scale": (np.uint8, ml_dtypes.float8_e8m0fnu)},
    "RAWINT4": {"proj": (np.uint8, np.int32), "scale": (bf16,)},
    "GPTQ_INT4": {},
    "INT4_ZP": {"proj": (np.uint8, np.int32)},
    "MXFP4": {"proj": (np.uint8, np.int8), "scale": (np.uint8, ml_dtypes.float8_e8m0fnu)},
    "NVFP4": {"proj": (np.uint8, np.int8), "scale": (np.uint8, ml_dtypes.float8_e4m3fn)},
}


@every_method
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("how", [np.asarray, list, tuple])
def test_bytes_under_any_dtype_are_the_same_weights(method: str, which: int, how: Any) -> None:
    given = {}
    for name, array in native_layer(method).arguments.items():
        dtypes = DTYPES[method].get(name.partition("_")[2])
        viewed = array if dtypes is None else array.view(dtypes[min(which, len(dtypes) - 1)])
        given[name] = viewed if name.endswith("_global_scale") else how(viewed)
    assert_same_weights(method, given)


@pytest.mark.parametrize("how", [np.asarray, list])
def test_scales_of_rows_may_be_columns(how: Any) -> None:
    arguments = native_layer("FP8_PERCHANNEL").arguments
    columns = {name: how(s[:, :, None]) for name, s in arguments.items() if name.endswith("_scale")}
    assert_same_weights("FP8_PERCHANNEL", {**arguments, **columns})


@pytest.mark.parametrize(
    ("method", "dtype", "told"),
    [
        ("BF16", "float8_e4m3fn", "; FP8, FP8_PERCHANNEL and MXFP8 take float8_e4m3fn"),
        ("BF16", "int32", "; RAWINT4, GPTQ_INT4 and INT4_ZP take int32"),
        ("FP8", "bfloat16", "; BF16, AMXINT8, AMXINT4, MOE_INT8, MOE_INT4 and LLAMAFILE take bfloat16"),
        ("AMXINT8", "float8_e4m3fn", "; FP8, FP8_PERCHANNEL and MXFP8 take float8_e4m3fn"),
        ("MXFP4", "complex64", ""),
    ],
)
def test_a_dtype_of_another_method_names_that(method: str, dtype: str, told: str) -> None:
    moe = KTMoEWrapper(0, E, 2, H, I, method=method)
    weights = np.zeros((E, I, H), dtype)
    with pytest.raises(TypeError, match=rf"^gate_proj: got {dtype} .*\]{told}$"):
        moe.load_weights_from_tensors(weights, weights, weights)
