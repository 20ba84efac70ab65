"""Is what quantized layers compute right? Every method against the reference, and laws to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    ACTIVATIONS,
    Batch,
    Layer,
    assert_close,
    assert_same_bits,
    draw_batch,
    draw_layer,
    num_examples,
)
from quantized_layers import METHODS, product_of, quantized_layer

from ktmoe_np import KTMoEWrapper

pytestmark = pytest.mark.kernels

SIZES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 45, 63, 64, 65, 70, 95, 100, 128, 129, 160)
TOKENS = (0, 1, 2, 3, 4, 5, 7, 13, 14, 16, 17, 33, 65)
BAD_NUMBERS = (np.nan, np.inf, -np.inf)
every_method = pytest.mark.parametrize(("method", "group_size"), METHODS)


def check(layer: Layer, batch: Batch, method: str, group_size: int | None, **options: Any) -> None:
    got = layer.forward(batch, method=method, group_size=group_size, **options)
    assert_close(got, quantized_layer(layer, method, group_size), batch, product=product_of(method))


@settings(deadline=None, max_examples=num_examples(200))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_drawn_layers(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_experts, num_slots = data.draw(st.integers(1, 5), "E"), data.draw(st.integers(1, 3), "P")
    inter, hidden = data.draw(st.sampled_from(SIZES), "I"), data.draw(st.sampled_from(SIZES), "H")
    activation = data.draw(st.sampled_from(ACTIVATIONS), "activation")
    with_biases = data.draw(st.booleans(), "biases")
    layer = draw_layer(rng, num_experts, inter, hidden, activation, with_biases=with_biases)
    batch = draw_batch(rng, layer, data.draw(st.sampled_from(TOKENS), "T"), num_slots)
    if len(batch.x) and data.draw(st.booleans(), "one bad number"):
        batch.x[rng.integers(len(batch.x)), rng.integers(hidden)] = data.draw(st.sampled_from(BAD_NUMBERS))
    method, group_size = data.draw(st.sampled_from(METHODS), "method")
    check(layer, batch, method, group_size)


@every_method
def test_many_rows_of_long_weights(method: str, group_size: int | None) -> None:
    rng = np.random.default_rng(1)
    layer = draw_layer(rng, 2, 100, 2200)
    check(layer, draw_batch(rng, layer, 150, 2), method, group_size)


@every_method
def test_a_token_has_the_same_bits_alone_and_in_a_batch(method: str, group_size: int | None) -> None:
    rng = np.random.default_rng(2)
    layer = draw_layer(rng, 3, 70, 130, with_biases=True)
    batch = draw_batch(rng, layer, 40, 2)
    moe = layer.wrapper(2, method=method, group_size=group_size)
    whole = moe.forward(*batch)
    for t in (0, 7, 39):
        assert_same_bits(moe.forward(*(array[t : t + 1] for array in batch)), whole[t : t + 1])
    order = rng.permutation(40)
    assert_same_bits(moe.forward(*(array[order] for array in batch)), whole[order])


@every_method
def test_an_expert_that_another_map_names_is_that_expert(method: str, group_size: int | None) -> None:
    rng = np.random.default_rng(3)
    layer = draw_layer(rng, 4, 40, 64)
    batch = draw_batch(rng, layer, 9, 2)
    order = np.array([2, 0, 3, 1])
    mapped = layer.wrapper(2, order, method=method, group_size=group_size).forward(*batch)
    picked = layer.picked(order).wrapper(2, method=method, group_size=group_size).forward(*batch)
    assert_same_bits(mapped, picked)


@pytest.mark.parametrize("method", ["AMXINT8", "AMXINT4"])
def test_a_row_of_zeros_and_rows_that_are_not_finite(method: str) -> None:
    rng = np.random.default_rng(4)
    layer = draw_layer(rng, 2, 33, 65)
    batch = draw_batch(rng, layer, 6, 2)
    batch.x[1] = 0
    batch.x[3, 5], batch.x[4, 0] = np.nan, np.inf
    got = layer.forward(batch, method=method).astype(np.float32)
    assert np.isnan(got[[3, 4]]).all()
    assert np.isfinite(got[[0, 1, 2, 5]]).all()
    assert (got[1] == 0).all()


@pytest.mark.parametrize("method", ["AMXINT4", "MOE_INT4"])
def test_bytes_that_are_no_multipliers_stand_for_zeros(method: str) -> None:
    rng = np.random.default_rng(5)
    layer = draw_layer(rng, 2, 33, 96)
    batch = draw_batch(rng, layer, 20, 1)

    def rows(num: int, columns: int) -> Any:
        codes = rng.integers(0, 256, (2, num, columns // 2 + columns % 2 + -(-columns // 32)), np.uint8)
        codes[..., columns // 2 + columns % 2 :] = rng.choice(np.array([16, 127, 128, 240], np.uint8))
        return codes

    moe = KTMoEWrapper(0, 2, 1, 96, 33, method=method)
    scales = {
        f"{name}_scale": np.ones((2, num), np.float32)
        for name, num in (("gate", 33), ("up", 33), ("down", 96))
    }
    moe.load_weights_from_tensors(rows(33, 96), rows(33, 96), rows(96, 33), **scales)
    for tokens in (batch, batch.rows(slice(0, 1))):
        assert (moe.forward(*tokens).astype(np.float32) == 0).all()
