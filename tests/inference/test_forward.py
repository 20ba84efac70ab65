"""Is the result right? The engine against the reference, within the roundings that it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    ACTIVATIONS,
    IS_SLOW,
    ISA,
    STORAGES,
    Batch,
    Layer,
    assert_close,
    assert_same_bits,
    bf16,
    draw,
    draw_batch,
    draw_layer,
    num_examples,
    run_python,
    stored,
)

from ktmoe_np.config import parse_activation
from ktmoe_np.reference import moe_forward

pytestmark = [pytest.mark.kernels, pytest.mark.asan]

AnyArray = Any

#: One element, a tile and its neighbors, pairs and steps of every instruction set, and odd ones.
SIZES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 45, 64, 70, 95, 100, 128, 129, 160)
TOKENS = (0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65)
BAD_NUMBERS = (np.nan, np.inf, -np.inf)
ROUTINGS = ("random", "distinct", "one expert", "one id twice", "some skipped", "all skipped", "two tokens")


def routed(batch: Batch, routing: str, num_experts: int, rng: np.random.Generator) -> Batch:
    """The batch with ids of the kind that the name says."""
    ids = batch.ids.copy()
    if routing == "distinct" and ids.shape[1] <= num_experts:
        for row in ids:
            row[...] = rng.permutation(num_experts)[: len(row)]
    elif routing == "one expert":
        ids[...] = num_experts - 1
    elif routing == "one id twice":
        ids[:, -1] = ids[:, 0]
    elif routing == "some skipped":
        ids[rng.random(ids.shape) < 0.5] = rng.choice([-1, -7, np.iinfo(np.int64).min])
    elif routing == "all skipped":
        ids[...] = -1
    elif routing == "two tokens":
        ids[2:] = -1
    return batch._replace(ids=ids)


@settings(deadline=None, max_examples=num_examples(300))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_drawn_layers(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_experts, num_slots = data.draw(st.integers(1, 6), "E"), data.draw(st.integers(1, 4), "P")
    inter, hidden = data.draw(st.sampled_from(SIZES), "I"), data.draw(st.sampled_from(SIZES), "H")
    activation = data.draw(st.sampled_from(ACTIVATIONS), "activation")
    with_biases = data.draw(st.booleans(), "biases")
    layer = draw_layer(rng, num_experts, inter, hidden, activation, with_biases=with_biases)
    layer = replace(layer, scale_inputs=data.draw(st.booleans(), "scaled inputs"))
    batch = draw_batch(rng, layer, data.draw(st.sampled_from(TOKENS), "T"), num_slots)
    batch = routed(batch, data.draw(st.sampled_from(ROUTINGS), "routing"), num_experts, rng)

    if len(batch.x) and data.draw(st.booleans(), "one bad number"):
        batch.x[rng.integers(len(batch.x)), rng.integers(hidden)] = data.draw(st.sampled_from(BAD_NUMBERS))
    mask = rng.random(num_experts) < 0.5 if data.draw(st.booleans(), "masked") else None
    mapped = rng.integers(0, num_experts, num_experts) if data.draw(st.booleans(), "mapped") else None
    out_dtype = data.draw(st.sampled_from([bf16, np.dtype(np.float32)]), "out")
    out = rng.standard_normal(batch.x.shape, np.float32).astype(out_dtype)
    incremental = data.draw(st.booleans(), "incremental")
    base = out.copy() if incremental else None
    storage = data.draw(st.sampled_from(list(STORAGES)), "storage")
    chunk = data.draw(st.sampled_from([4096, 5]), "chunk")

    as_stored = layer.with_matrices(lambda array: stored(array, storage))
    moe = as_stored.wrapper(num_slots, mapped, gpu_experts_mask=mask, chunked_prefill_size=chunk)
    assert moe.forward(*batch, out=out, incremental=incremental) is out
    assert_close(out, layer, batch, gpu_experts_mask=mask, physical_to_logical_map=mapped, base=base)


@settings(deadline=None, max_examples=num_examples(100))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_integers_are_right_to_the_last_bit(data: st.DataObject, seed: int) -> None:
    """Their sums are exact in any order: what remains are the two named roundings, with many ties."""
    rng = np.random.default_rng(seed)
    num_experts, num_slots = data.draw(st.integers(1, 4), "E"), data.draw(st.integers(1, 4), "P")
    inter = data.draw(st.sampled_from([*SIZES, 2051]), "I")
    hidden = data.draw(st.sampled_from(SIZES if inter > 2000 else [*SIZES, 2100]), "H")

    def integers(*shape: int) -> AnyArray:
        return rng.integers(-1, 2, shape).astype(bf16)

    gate, down = integers(num_experts, inter, hidden), integers(num_experts, hidden, inter)
    biases = {"gate_bias": rng.integers(-9, 30, (num_experts, inter)).astype(np.float32)}
    layer = Layer(gate, None, down, **biases, activation="relu2")
    routes = (data.draw(st.sampled_from(TOKENS), "T"), num_slots)
    batch = Batch(
        integers(routes[0], hidden),
        rng.integers(-1, num_experts, routes),
        rng.integers(-4, 5, routes).astype(np.float32),
    )
    out = np.empty(batch.x.shape, data.draw(st.sampled_from([bf16, np.dtype(np.float32)]), "out"))
    expected = moe_forward(*batch, *layer.matrices, **biases, activation="relu2", out_dtype=out.dtype)
    # Zero may have either sign.
    np.testing.assert_array_equal(
        layer.forward(batch, out=out).astype(np.float32), expected.astype(np.float32)
    )


#: name -> (E, I, H, P, T)
SHAPES = {
    "a width of 704": (3, 704, 96, 2, 9),
    "rows of no multiple of 32": (3, 45, 70, 2, 40),
    "a hidden size above 2048": (2, 33, 2081, 2, 5),
    "a hidden size of exactly 2048": (2, 16, 2048, 1, 3),
    "three blocks of the hidden size": (1, 9, 4200, 1, 18),
    "an intermediate size above 2048": (2, 2049, 34, 1, 5),
    "an intermediate size above 4096": (1, 4111, 16, 1, 3),
    "many experts for few tokens": (64, 40, 48, 4, 3),
    "300 tokens": (5, 64, 96, 2, 300),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str) -> None:
    num_experts, inter, hidden, num_slots, num_tokens = SHAPES[shape]
    rng = np.random.default_rng(1)
    layer = draw_layer(rng, num_experts, inter, hidden, with_biases=True)
    batch = draw_batch(rng, layer, num_tokens, num_slots)
    assert_close(layer.forward(batch, out=np.empty(batch.x.shape, np.float32)), layer, batch)


@pytest.mark.parametrize("num_tokens", [255, 256, 257, 300])
def test_more_rows_on_one_expert_than_a_panel_has(num_tokens: int) -> None:
    rng = np.random.default_rng(2)
    layer = draw_layer(rng, 3, 45, 70)
    batch = draw_batch(rng, layer, num_tokens, 1)
    batch.ids[...] = 1
    assert_close(layer.forward(batch), layer, batch)


@pytest.mark.parametrize(("inter", "hidden"), [(40, 2100), (2100, 40)])
def test_long_rows_of_many_tokens(inter: int, hidden: int) -> None:
    rng = np.random.default_rng(3)
    layer = draw_layer(rng, 1, inter, hidden)
    batch = draw_batch(rng, layer, 135, 1)
    assert_close(layer.forward(batch), layer, batch)


def test_an_empty_batch() -> None:
    rng = np.random.default_rng(4)
    layer = draw_layer(rng, 2, 16, 24)
    result = layer.forward(draw_batch(rng, layer, 0, 2))
    assert (result.dtype, result.shape) == (bf16, (0, 24))


# ---- the function inside an expert ----


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_an_activation_on_every_number(activation: Any) -> None:
    """Token t picks column t of gate and up, the identity brings the intermediate out."""
    size = 128 if IS_SLOW else 256
    rng = np.random.default_rng(5)
    patterns = np.arange(2**16) if size == 256 else rng.permutation(2**16)[: size * size]
    gate = patterns.astype(np.uint16).view(bf16).reshape(1, size, size)
    gate = np.where(np.isfinite(gate.astype(np.float32)), gate, bf16.type(1.0))
    # A square must not overflow: then any result is right.
    small = np.clip(gate.astype(np.float32), -1e18, 1e18).astype(bf16)
    up = draw(rng, 1, size, size, scale=3.0)
    up[0, :8, :8] = np.float32([-1e30, -7, -1.5, -1, 0, 1e-30, 1.5, 7]).astype(bf16)
    layer = Layer(
        small if parse_activation(activation).kind in ("relu2", "gelu_tanh") else gate,
        up if parse_activation(activation).gated else None,
        np.eye(size, dtype=np.float32).astype(bf16)[None],
        activation=activation,
    )
    one_hot = np.eye(size, dtype=np.float32).astype(bf16)
    batch = Batch(one_hot, np.zeros((size, 1), np.int64), np.ones((size, 1), np.float32))
    assert_close(layer.forward(batch, out=np.empty((size, size), np.float32)), layer, batch)


# ---- where the arrays lie ----


@pytest.mark.parametrize("storage", STORAGES)
def test_weights_are_read_where_they_lie(storage: str) -> None:
    rng = np.random.default_rng(6)
    layer = draw_layer(rng, 3, 45, 70)
    batch = draw_batch(rng, layer, 20, 2)
    assert_close(layer.with_matrices(lambda array: stored(array, storage)).forward(batch), layer, batch)


def test_weights_in_a_mapped_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    layer = draw_layer(rng, 3, 45, 70)
    header = 6  # bytes, so that every row is misaligned

    def mapped(array: AnyArray) -> AnyArray:
        path = tmp_path / f"{id(array)}"
        path.write_bytes(b"header" + array.tobytes())
        raw = np.memmap(path, np.uint8, "r", offset=0)
        return raw[header:].view(bf16).reshape(array.shape)

    batch = draw_batch(rng, layer, 20, 2)
    assert_close(layer.with_matrices(mapped).forward(batch), layer, batch)


def test_all_experts_share_one_matrix() -> None:
    rng = np.random.default_rng(8)
    layer = draw_layer(rng, 1, 45, 70)
    repeated = layer.with_matrices(lambda array: np.broadcast_to(array, (5, *array.shape[1:])))
    batch = draw_batch(rng, repeated, 20, 2)
    assert_close(repeated.forward(batch), repeated, batch)


GUARDED = """
    import ctypes, mmap, sys
    import numpy as np
    from layers import assert_same_bits, bf16, draw_batch, draw_layer

    libc = ctypes.CDLL(None, use_errno=True)
    kept = []

    def guarded(array, at_end):
        '''A copy that ends, or begins, where no memory is.'''
        page = mmap.PAGESIZE
        pages = -(-array.nbytes // page)
        memory = mmap.mmap(-1, (pages + 2) * page)
        kept.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (address, address + (pages + 1) * page):
            assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
        start = page + (pages * page - array.nbytes if at_end else 0)
        copy = np.frombuffer(memory, np.uint8, array.nbytes, start).view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy

    rng = np.random.default_rng(0)
    for inter, hidden in [(1, 1), (16, 31), (33, 32), (45, 70), (64, 64), (7, 2050), (2050, 7)]:
        for tokens in (1, 5, 17):
            for at_end in (True, False):
                layer = draw_layer(rng, 2, inter, hidden, with_biases=True)
                batch = draw_batch(rng, layer, tokens, 2)
                expected = layer.forward(batch)
                inside = layer.with_matrices(lambda array: [guarded(matrix, at_end) for matrix in array])
                out = guarded(np.zeros(batch.x.shape, bf16), at_end)
                inside.forward(type(batch)(*(guarded(array, at_end) for array in batch)), out=out)
                assert_same_bits(out, expected)
    print("done")
"""


def test_nothing_is_touched_outside_an_array() -> None:
    done = run_python(GUARDED)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


LAYOUTS: dict[str, Callable[[AnyArray], AnyArray]] = {
    "plain": np.copy,
    "strided": lambda array: np.repeat(array, 3, axis=1)[:, ::3],
    "columns of more": lambda array: np.concatenate([array, array], axis=1)[:, : array.shape[1]],
    "transposed": np.asfortranarray,
    "backwards": lambda array: array[::-1].copy()[::-1],
}


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">i8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_of_any_integer_dtype(dtype: str, layout: str) -> None:
    rng = np.random.default_rng(9)
    layer = draw_layer(rng, 5, 16, 24)
    batch = draw_batch(rng, layer, 6, 2)
    ids = LAYOUTS[layout](batch.ids.astype(dtype))
    expected = layer.forward(batch)
    assert_same_bits(layer.forward(batch._replace(ids=ids)), expected)
    assert_same_bits(layer.forward(batch._replace(ids=ids), chunked_prefill_size=4), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routing_weights_in_any_order(layout: str) -> None:
    rng = np.random.default_rng(9)
    layer = draw_layer(rng, 5, 16, 24)
    batch = draw_batch(rng, layer, 6, 2)
    weights = LAYOUTS[layout](batch.weights)
    expected = layer.forward(batch)
    assert_same_bits(layer.forward(batch._replace(weights=weights)), expected)
    assert_same_bits(layer.forward(batch._replace(weights=weights), chunked_prefill_size=4), expected)


def test_inputs_are_never_written() -> None:
    rng = np.random.default_rng(10)
    layer = draw_layer(rng, 3, 45, 70, with_biases=True)
    batch = draw_batch(rng, layer, 20, 2)
    arrays = [array for array in (*batch, *layer.matrices, *layer.biases.values()) if array is not None]
    copies = [array.copy() for array in arrays]
    for array in arrays:
        array.setflags(write=False)
    moe = layer.wrapper(2)
    moe.forward(*batch)
    moe.submit_forward(*batch)
    moe.sync_forward()
    for array, copy in zip(arrays, copies, strict=True):
        assert_same_bits(array, copy)


def test_biases_are_copied() -> None:
    rng = np.random.default_rng(11)
    layer = draw_layer(rng, 3, 16, 24, with_biases=True)
    batch = draw_batch(rng, layer, 20, 2)
    moe = layer.wrapper(2)
    before = moe.forward(*batch)
    for bias in layer.biases.values():
        assert bias is not None
        bias[...] = np.nan
    assert_same_bits(moe.forward(*batch), before)


def test_the_instruction_set_under_test() -> None:
    """The tests below another name would prove nothing."""
    import os

    wanted = os.environ.get("KTMOE_ISA")
    assert wanted in (None, "", ISA)
