"""Are layers right whose products take int8 activations? The reference, and laws to the bit."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import pytest
from gguf_blocks import GGUF_BLOCKS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from int8_layers import METHODS, PLAIN_TYPES, draw_int8_layer
from layers import ACTIVATIONS, MANY_TOKENS, POOLS, Batch, assert_same_bits, draw_batch, num_examples
from sft_layers import low_level_inference

from ktmoe_np.reference import IntegerMatrix, integer_product, integers_of_quantized, round_bf16

pytestmark = pytest.mark.kernels

AnyArray = Any

SIZES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 160, 257, 300)
TOKENS = (0, 1, 2, 3, 4, 5, 7, 13, 14, 16, 17, 33, 65)
BAD_NUMBERS = (np.nan, np.inf, -np.inf)
every_method = pytest.mark.parametrize(
    "method", METHODS, ids=lambda m: ", ".join(str(part) for part in m if part is not None)
)


def exact(moe: Any, batch: Batch, **options: Any) -> AnyArray:
    """The result before its last rounding, where a difference cannot hide."""
    result: AnyArray = moe.forward(*batch, out=np.empty(batch.x.shape, np.float32), **options)
    return result


# ---- against the reference ----


@settings(deadline=None, max_examples=num_examples(300))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_drawn_layers(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    method = data.draw(st.sampled_from(METHODS), "method")
    num_experts, num_slots = data.draw(st.integers(1, 4), "E"), data.draw(st.integers(1, 3), "P")
    inter, hidden = data.draw(st.sampled_from(SIZES), "I"), data.draw(st.sampled_from(SIZES), "H")
    activation = data.draw(st.sampled_from(ACTIVATIONS), "activation")
    types = ("q8_0",) * 3
    if method[0] == "LLAMAFILE":
        one_type = st.sampled_from([*GGUF_BLOCKS, *PLAIN_TYPES])
        types = data.draw(st.tuples(one_type, one_type, one_type), "types")
        assume(types[0] in GGUF_BLOCKS or types[2] in GGUF_BLOCKS)
    with_biases = data.draw(st.booleans(), "biases")
    sizes = num_experts, inter, hidden
    layer = draw_int8_layer(rng, method, sizes, activation, types=types, with_biases=with_biases)
    if data.draw(st.booleans(), "scaled inputs"):
        layer = layer.scaling_inputs()
    batch = draw_batch(rng, layer.layer, data.draw(st.sampled_from(TOKENS), "T"), num_slots)
    if len(batch.x) and data.draw(st.booleans(), "one bad number"):
        batch.x[rng.integers(len(batch.x)), rng.integers(hidden)] = data.draw(st.sampled_from(BAD_NUMBERS))
    moe = layer.wrapper(num_slots, activation_dtype="int8")
    layer.assert_close(exact(moe, batch), batch)
    layer.assert_close(moe.forward(*batch), batch)


@pytest.mark.parametrize("name", GGUF_BLOCKS)
@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_every_type_of_gguf(name: str, tokens: int) -> None:
    rng = np.random.default_rng(1)
    layer = draw_int8_layer(rng, ("LLAMAFILE", None), (2, 256, 768), types=(name,) * 3)
    batch = draw_batch(rng, layer.layer, tokens, 2)
    layer.assert_close(exact(layer.wrapper(2), batch, activation_dtype="int8"), batch)


@pytest.mark.parametrize("types", [("bf16", "q4_k", "q8_0"), ("q4_k", "f16", "f32"), ("f32", "bf16", "q6_k")])
def test_projections_in_floats_stay_in_bfloat16(types: Any) -> None:
    rng = np.random.default_rng(2)
    layer = draw_int8_layer(rng, ("LLAMAFILE", None), (2, 256, 512), types=types, with_biases=True)
    for tokens in (1, 30):
        batch = draw_batch(rng, layer.layer, tokens, 2)
        moe = layer.wrapper(2, activation_dtype="int8")
        layer.assert_close(exact(moe, batch), batch)
        assert not np.array_equal(exact(moe, batch), exact(moe, batch, activation_dtype="bfloat16"))


@every_method
@pytest.mark.parametrize(("inter", "hidden", "tokens"), [(704, 300, 9), (100, 2200, MANY_TOKENS)])
def test_widths_of_models_and_long_rows(method: Any, inter: int, hidden: int, tokens: int) -> None:
    rng = np.random.default_rng(3)
    layer = draw_int8_layer(rng, method, (2, inter, hidden))
    batch = draw_batch(rng, layer.layer, tokens, 2)
    layer.assert_close(exact(layer.wrapper(2, activation_dtype="int8"), batch), batch)


def product(x: AnyArray, matrix: Any) -> AnyArray:
    integers = matrix if isinstance(matrix, IntegerMatrix) else integers_of_quantized(matrix)
    return integer_product(x.astype(np.float32), integers)


@every_method
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_products_have_the_bits_of_the_reference(method: Any, tokens: int) -> None:
    """relu2 rounds as NumPy does, so that nothing between the products differs."""
    rng = np.random.default_rng(4)
    layer = draw_int8_layer(rng, method, (1, 288, 640), "relu2")
    gate, down = layer.integers.gate_proj[0], layer.integers.down_proj[0]
    batch = draw_batch(rng, layer.layer, tokens, 1)
    batch.weights[...] = 1
    h = round_bf16(np.square(np.maximum(product(batch.x, gate), 0)))
    got = exact(layer.wrapper(1, activation_dtype="int8"), batch)
    assert_same_bits(got + np.float32(0), product(h, down) + np.float32(0))


@every_method
@pytest.mark.parametrize("bad", BAD_NUMBERS)
def test_a_row_that_is_not_finite_spoils_itself_alone(method: Any, bad: float) -> None:
    rng = np.random.default_rng(5)
    layer = draw_int8_layer(rng, method, (2, 64, 300))
    moe = layer.wrapper(2, activation_dtype="int8")
    for tokens in (1, 6, 40):
        batch = draw_batch(rng, layer.layer, tokens, 2)
        clean = moe.forward(*batch)
        batch.x[tokens // 2, 200] = bad
        got = moe.forward(*batch)
        others = np.arange(tokens) != tokens // 2
        assert np.isnan(got[tokens // 2].astype(np.float32)).all()
        assert_same_bits(got[others], clean[others])


@every_method
def test_zeros_give_zeros(method: Any) -> None:
    rng = np.random.default_rng(6)
    layer = draw_int8_layer(rng, method, (2, 64, 300))
    batch = draw_batch(rng, layer.layer, 20, 2)
    batch.x[3], batch.x[4, :128] = 0, 0
    got = exact(layer.wrapper(2, activation_dtype="int8"), batch)
    assert not got[3].any()
    layer.assert_close(got, batch)


# ---- laws ----


@every_method
@pytest.mark.parametrize("routing", ["spread", "one expert"])
def test_a_token_has_the_same_bits_in_batches_of_all_sizes(method: Any, routing: str) -> None:
    rng = np.random.default_rng(7)
    layer = draw_int8_layer(rng, method, (3, 96, 300), with_biases=True)
    batch = draw_batch(rng, layer.layer, 150, 2)
    if routing == "one expert":
        batch.ids[...] = 0
    moe = layer.wrapper(2, activation_dtype="int8")
    whole = exact(moe, batch)
    for num in (1, 2, 3, 4, 5, 8, 13, 16, 17, 31, 33, 64, 65, 129):
        assert_same_bits(exact(moe, batch.rows(slice(num))), whole[:num], f"{num} tokens")
    for t in (7, 80, 149):
        assert_same_bits(exact(moe, batch.rows(slice(t, t + 1))), whole[t : t + 1], f"token {t}")
    order = rng.permutation(150)
    assert_same_bits(exact(moe, batch.rows(order)), whole[order])


@every_method
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_any_threads_give_the_same_bits(engines: list[Any], method: Any, tokens: int) -> None:
    rng = np.random.default_rng(8)
    layer = draw_int8_layer(rng, method, (5, 192, 260), with_biases=True)
    batch = draw_batch(rng, layer.layer, tokens, 2)
    expected = exact(layer.wrapper(2, activation_dtype="int8"), batch)
    ways = cycle((("int8", None), (None, "int8"), ("bfloat16", "int8")))
    for pool, engine, (made, called) in zip(POOLS, engines, ways, strict=False):
        moe = low_level_inference(engine, layer.student(rng, 0), 2, activation_dtype=made)
        out = np.full(batch.x.shape, np.nan, np.float32)
        engine.run(moe.forward_task(*batch, out, activation_dtype=called))
        assert_same_bits(out, expected, f"threads {pool}, {made}, {called}")


@every_method
def test_a_call_that_asks_is_a_layer_that_was_made_so(method: Any) -> None:
    rng = np.random.default_rng(9)
    layer = draw_int8_layer(rng, method, (4, 96, 300), with_biases=True)
    mask = np.array([False, True, False, False])
    order = np.array([2, 0, 3, 1])
    made = {
        dtype: layer.wrapper(2, order, gpu_experts_mask=mask, activation_dtype=dtype)
        for dtype in (None, "bfloat16", "int8")
    }
    for tokens in (1, 20):
        batch = draw_batch(rng, layer.layer, tokens, 2)
        batch.ids[0] = 0, 2
        in_int8, in_bf16 = exact(made["int8"], batch), exact(made["bfloat16"], batch)
        assert not np.array_equal(in_int8, in_bf16)
        for moe in made.values():
            assert_same_bits(exact(moe, batch, activation_dtype="int8"), in_int8)
            assert_same_bits(exact(moe, batch, activation_dtype="bfloat16"), in_bf16)
        assert_same_bits(exact(made[None], batch), in_bf16)


@every_method
def test_chunks_have_the_bits_of_the_whole(method: Any) -> None:
    rng = np.random.default_rng(10)
    layer = draw_int8_layer(rng, method, (3, 64, 256))
    batch = draw_batch(rng, layer.layer, 50, 2)
    whole = exact(layer.wrapper(2, activation_dtype="int8"), batch)
    chunked = layer.wrapper(2, chunked_prefill_size=7)
    assert_same_bits(exact(chunked, batch, activation_dtype="int8"), whole)
