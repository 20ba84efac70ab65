"""Is what layers compute right that read a checkpoint's own encoding? The reference, and laws to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import ACTIVATIONS, assert_close, assert_same_bits, bf16, draw_batch, draw_layer, num_examples
from native_layers import METHODS, draw_native_layer

from ktmoe_np import KTMoEWrapper
from ktmoe_np.reference import decode_gptq_int4, decode_mxfp4, decode_mxfp8, decode_rawint4

pytestmark = pytest.mark.kernels

SIZES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 45, 63, 64, 65, 70, 95, 100, 128, 129, 160, 257)
TOKENS = (0, 1, 2, 3, 4, 5, 7, 13, 14, 16, 17, 33, 65)
every_method = pytest.mark.parametrize("method", METHODS)


@settings(deadline=None, max_examples=num_examples(200))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_drawn_layers(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    method = data.draw(st.sampled_from(METHODS), "method")
    num_experts, num_slots = data.draw(st.integers(1, 4), "E"), data.draw(st.integers(1, 3), "P")
    inter, hidden = data.draw(st.sampled_from(SIZES), "I"), data.draw(st.sampled_from(SIZES), "H")
    activation = data.draw(st.sampled_from(ACTIVATIONS), "activation")
    with_biases = data.draw(st.booleans(), "biases")
    layer = draw_native_layer(rng, method, num_experts, inter, hidden, activation, with_biases=with_biases)
    batch = draw_batch(rng, layer, data.draw(st.sampled_from(TOKENS), "T"), num_slots)
    assert_close(layer.forward(batch, method=method), layer, batch)


@every_method
@pytest.mark.parametrize(("inter", "hidden", "tokens"), [(704, 300, 9), (100, 2200, 150)])
def test_widths_of_models_and_long_rows(method: str, inter: int, hidden: int, tokens: int) -> None:
    rng = np.random.default_rng(1)
    layer = draw_native_layer(rng, method, 2, inter, hidden)
    batch = draw_batch(rng, layer, tokens, 2)
    assert_close(layer.forward(batch, method=method), layer, batch)


@every_method
def test_a_token_has_the_same_bits_alone_and_in_a_batch(method: str) -> None:
    rng = np.random.default_rng(2)
    layer = draw_native_layer(rng, method, 3, 160, 192, with_biases=True)
    batch = draw_batch(rng, layer, 60, 2)
    moe = layer.wrapper(2, method=method)
    whole = moe.forward(*batch)
    for t in (0, 7, 59):
        assert_same_bits(moe.forward(*(array[t : t + 1] for array in batch)), whole[t : t + 1])
    order = rng.permutation(60)
    assert_same_bits(moe.forward(*(array[order] for array in batch)), whole[order])


@every_method
def test_an_expert_that_another_map_names_is_that_expert(method: str) -> None:
    rng = np.random.default_rng(3)
    layer = draw_native_layer(rng, method, 4, 40, 64)
    batch = draw_batch(rng, layer, 9, 2)
    order = np.array([2, 0, 3, 1])
    mapped = layer.wrapper(2, order, method=method).forward(*batch)
    ids = order[batch.ids]
    assert_same_bits(mapped, layer.wrapper(2, method=method).forward(batch.x, ids, batch.weights))


@every_method
def test_arrays_for_each_expert_with_rows_apart(method: str) -> None:
    rng = np.random.default_rng(4)
    layer = draw_native_layer(rng, method, 3, 64, 96)
    batch = draw_batch(rng, layer, 9, 2)
    apart = {}
    for name, array in layer.arguments.items():
        apart[name] = array
        if name.endswith("_proj") and array.ndim == 3:
            wide = np.zeros((3, array.shape[1], 2, array.shape[2]), array.dtype)
            wide[:, :, 1] = array
            apart[name] = list(wide[:, :, 1])
    moe = KTMoEWrapper(0, 3, 2, 96, 64, method=method)
    moe.load_weights_from_tensors(**apart)
    assert_same_bits(moe.forward(*batch), layer.forward(batch, method=method))


#: Every code of a format in a row of weights [1, K]: codes, scale, and the numbers by ml_dtypes.
ALL_CODES: dict[str, tuple[Any, Any, Any]] = {
    "FP8_PERCHANNEL": (
        np.arange(256, dtype=np.uint8)[None],
        np.ones(1, np.float32),
        np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
    ),
    "MXFP8": (
        np.arange(256, dtype=np.uint8)[None],
        np.full((1, 8), 127, np.uint8),
        np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
    ),
    "MXFP4": (
        (np.arange(0, 16, 2) | np.arange(1, 16, 2) << 4).astype(np.uint8)[None],
        np.full((1, 1), 127, np.uint8),
        np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32),
    ),
    "RAWINT4": (
        (np.arange(0, 16, 2) | np.arange(1, 16, 2) << 4).astype(np.uint8)[None],
        np.ones((1, 1), bf16),
        np.arange(-8, 8).astype(np.float32),
    ),
}


def one_matrix(method: str, codes: Any, scale: Any, num_columns: int) -> Any:
    """A layer whose first projection is [1, K] and is given, and whose second one hands its result on."""
    moe = KTMoEWrapper(0, 1, 1, num_columns, 1, method=method, activation="relu2")
    one = {"FP8_PERCHANNEL": 0x38, "MXFP8": 0x38, "MXFP4": 0x02, "RAWINT4": 0x09}[method]
    down = np.full((1, num_columns, 1), one, np.uint8)
    down_scale = {
        "FP8_PERCHANNEL": np.ones((1, num_columns), np.float32),
        "RAWINT4": np.ones((1, num_columns, 1), bf16),
    }.get(method, np.full((1, num_columns, 1), 127, np.uint8))
    moe.load_weights_from_tensors(codes[None], None, down, gate_scale=scale[None], down_scale=down_scale)
    return moe


@pytest.mark.parametrize("method", ALL_CODES)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_every_code_is_what_its_definition_says(method: str, num_tokens: int) -> None:
    codes, scale, numbers = ALL_CODES[method]
    num_columns = len(numbers)
    moe = one_matrix(method, codes, scale, num_columns)
    for k, number in enumerate(numbers):
        if np.isnan(number):
            continue
        # The other columns are 0, but of NaN that makes NaN: those columns' codes are left out.
        x = np.zeros((num_tokens, num_columns), bf16)
        x[:, k] = 1
        clean = codes.copy()
        if codes.shape[1] == 256:
            clean[0, [0x7F, 0xFF]] = 0
            moe = one_matrix(method, clean, scale, num_columns) if k == 0 else moe
        out = moe.forward(x, np.zeros((num_tokens, 1), int), np.ones((num_tokens, 1), np.float32))
        expected = np.float32(max(number, 0) ** 2).astype(bf16)
        assert (out == expected).all(), (k, number, out[0, 0], expected)


@pytest.mark.parametrize("method", ["FP8", "FP8_PERCHANNEL", "MXFP8"])
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_codes_of_nan_are_nan(method: str, num_tokens: int) -> None:
    rng = np.random.default_rng(5)
    layer = draw_native_layer(rng, method, 1, 33, 65)
    codes = layer.arguments["down_proj"].view(np.uint8)
    codes[0, 7, 4] = 0x7F
    codes[0, 9, 5] = 0xFF
    out = layer.forward(draw_batch(rng, layer, num_tokens, 1), method=method).astype(np.float32)
    assert np.isnan(out[:, [7, 9]]).all()
    assert np.isfinite(np.delete(out, [7, 9], axis=1)).all()


@pytest.mark.parametrize("method", ["MXFP8", "MXFP4", "RAWINT4"])
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_scales_of_any_size(method: str, num_tokens: int) -> None:
    rng = np.random.default_rng(7)
    layer = draw_native_layer(rng, method, 1, 64, 96, "relu2")
    moe, arguments = KTMoEWrapper(0, 1, 1, 96, 64, method=method, activation="relu2"), dict(layer.arguments)
    one = {"MXFP8": np.full((1, 64, 96), 0x38, np.uint8), "MXFP4": np.full((1, 64, 48), 0x22, np.uint8)}
    numbers = one.get(method, np.full((1, 64, 48), 0x99, np.uint8))
    exponents = np.linspace(-60, 60, 64).round().astype(int)
    exponents[:4] = (-120, -117, -61, 61)
    powers = np.repeat((exponents + 127).astype(np.uint8)[None, :, None], 3, axis=2)
    scale = powers if method != "RAWINT4" else np.ldexp(np.float32(1), powers.astype(int) - 127).astype(bf16)
    moe.load_weights_from_tensors(**{**arguments, "gate_proj": numbers, "gate_scale": scale})
    x = np.zeros((num_tokens, 96), bf16)
    x[:, 40] = 1
    batch = draw_batch(rng, layer, num_tokens, 1)
    decode = {"MXFP8": decode_mxfp8, "MXFP4": lambda c, s: decode_mxfp4(c, s, 96)}
    gate = decode.get(method, lambda c, s: decode_rawint4(c, s, 96))(numbers, scale)
    assert_close(
        moe.forward(x, batch.ids, batch.weights), replace(layer, gate_proj=gate), batch._replace(x=x)
    )


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_scales_of_all_of_float16(num_tokens: int) -> None:
    """From the smallest that is not normal to the largest, times all codes."""
    rng = np.random.default_rng(8)
    layer = draw_native_layer(rng, "GPTQ_INT4", 1, 64, 96, "relu2")
    bits = np.linspace(1, 0x7BFF, 64).round().astype(np.uint16)
    scale = np.repeat(bits.view(np.float16)[None, None], 3, axis=1)
    numbers = rng.integers(-(2**31), 2**31, (1, 12, 64), np.int32)
    moe = KTMoEWrapper(0, 1, 1, 96, 64, method="GPTQ_INT4", activation="relu2")
    moe.load_weights_from_tensors(**{**layer.arguments, "gate_proj": numbers, "gate_scale": scale})
    batch = draw_batch(rng, layer, num_tokens, 1)
    x = np.zeros((num_tokens, 96), bf16)
    x[np.arange(num_tokens), rng.integers(0, 96, num_tokens)] = 1
    assert_close(
        moe.forward(x, batch.ids, batch.weights),
        replace(layer, gate_proj=decode_gptq_int4(numbers, scale)),
        batch._replace(x=x),
    )


def test_what_is_converted_may_be_written_to_afterwards() -> None:
    rng = np.random.default_rng(9)
    layer = draw_native_layer(rng, "GPTQ_INT4", 2, 64, 96)
    batch = draw_batch(rng, layer, 5, 2)
    moe = layer.wrapper(2, method="GPTQ_INT4")
    before = moe.forward(*batch)
    for array in layer.arguments.values():
        array[...] = 0
    assert_same_bits(moe.forward(*batch), before)


def test_bfloat16_has_no_scales() -> None:
    layer = draw_layer(np.random.default_rng(6), 2, 8, 8)
    moe = KTMoEWrapper(0, 2, 1, 8, 8)
    with pytest.raises(ValueError, match="gate_scale: got one, expected None: bfloat16 weights have no"):
        moe.load_weights_from_tensors(*layer.matrices, gate_scale=np.ones((2, 8), np.float32))
    assert not moe.loaded
