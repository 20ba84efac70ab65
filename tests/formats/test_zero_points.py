"""int4 with zero points: the rows that are made, layers of them, and the checkpoints they are found in."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import native_checkpoints
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import AnyArray, Layer, assert_close, assert_same_bits, bf16, draw_batch
from native_checkpoints import ENCODINGS, LAYER, draw_layer, put_layer
from native_layers import draw_native_layer
from sft_layers import assert_step_close, draw_student, draw_training, train

import ktmoe_np.formats.conversion
import ktmoe_np.formats.zero_points
from ktmoe_np import KTMoEWrapper
from ktmoe_np.formats.gptq import group_sizes
from ktmoe_np.formats.zero_points import int4_zp_rows
from ktmoe_np.io.inspect import inspect_checkpoint
from ktmoe_np.reference import decode_gptq_int4, decode_int4_zp, decode_rawint4, round_bf16

pytestmark = [pytest.mark.kernels, pytest.mark.asan]

E, I, H, P = 3, 256, 128, 2  # noqa: E741

blocks = pytest.mark.parametrize("block", [32, 64, 128])

#: The encodings of checkpoints that become such rows.
FOUND = tuple(name for name, (method, _) in ENCODINGS.items() if method == "INT4_ZP")


def test_doctests() -> None:
    for module in (ktmoe_np.formats.conversion, ktmoe_np.formats.zero_points):
        assert doctest.testmod(module).failed == 0


# ---- rows ----


def decoded(rows: AnyArray, block: int) -> AnyArray:
    """Each weight by the definition of a block."""
    cut = rows.reshape(*rows.shape[:-1], -1, 3 + block // 2)
    scale = np.ascontiguousarray(cut[..., :2]).view("<f2").astype(np.float32)
    zero = cut[..., 2:3].astype(np.float32)
    halves = cut[..., 3:].reshape(*cut.shape[:-1], block // 32, 16)
    codes = np.concatenate([halves & 15, halves >> 4], axis=-1).reshape(*cut.shape[:-1], block)
    return (scale * (codes.astype(np.float32) - zero)).reshape(*rows.shape[:-1], -1)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 8),
    st.sampled_from([32, 64, 128]),
    st.data(),
)
def test_rows_are_the_weights_of_the_reference(
    seed: int, num_rows: int, num_blocks: int, block: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    num_columns = num_blocks * block
    counts = [count for count, size in group_sizes(num_columns).items() if size % block == 0]
    shape = (2, num_rows, data.draw(st.sampled_from(counts)))
    codes = rng.integers(0, 256, (2, num_rows, num_columns // 2), np.uint8)
    scale = rng.integers(0, 2**16, shape, np.uint16).view(np.float16)
    scale = np.where(np.isfinite(scale), scale, np.float16(0))
    zero = rng.integers(0, 32, shape, np.uint8)
    rows = int4_zp_rows(codes, scale, zero, block)
    assert rows.shape == (2, num_rows, num_blocks * (3 + block // 2))
    expected = decode_int4_zp(codes, scale, zero)
    assert np.array_equal(round_bf16(decoded(rows, block)), expected.astype(np.float32))


# ---- layers ----


@blocks
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_blocks_of_every_size(block: int, num_tokens: int) -> None:
    rng = np.random.default_rng(block)
    layer = draw_native_layer(rng, "INT4_ZP", E, I, H, block=block)
    batch = draw_batch(rng, layer, num_tokens, P)
    moe = layer.wrapper(P, method="INT4_ZP", group_size=block)
    assert moe.expert_bytes == 3 * I * H // block * (3 + block // 2)
    assert_close(moe.forward(*batch), layer, batch)
    assert_same_bits(moe.forward(*batch), layer.wrapper(P, method="INT4_ZP").forward(*batch))
    integers = layer.with_integers("INT4_ZP", block)
    assert_close(moe.forward(*batch, activation_dtype="int8"), integers, batch, activation_dtype="int8")


@blocks
def test_training_on_blocks_of_every_size(block: int) -> None:
    rng = np.random.default_rng(block)
    student = draw_student(rng, (E, I, H), 8, method=("INT4_ZP_SFT", block), block=block)
    batch, grad_output = draw_training(rng, student, 20, P)
    assert_step_close(train(student.wrapper(P), batch, grad_output), student, batch, grad_output)


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_every_zero_point_and_every_nibble(num_tokens: int) -> None:
    """A row of the gate for each zero point, with all nibbles."""
    rng = np.random.default_rng(0)
    layer = draw_native_layer(rng, "INT4_ZP", 1, 32, 32, "relu2")
    zero = np.arange(32, dtype=np.uint8).reshape(1, 32, 1)
    codes = np.tile(np.arange(16, dtype=np.uint8) * np.uint8(0x11), (1, 32, 1))
    gate = {"gate_proj": codes, "gate_scale": np.ones((1, 32, 1), np.float16), "gate_zero": zero}
    moe = KTMoEWrapper(0, 1, 1, 32, 32, method="INT4_ZP", activation="relu2")
    moe.load_weights_from_tensors(**{**layer.arguments, **gate})
    batch = draw_batch(rng, layer, num_tokens, 1)
    decoded_gate = decode_int4_zp(codes, gate["gate_scale"], zero)
    assert_close(moe.forward(*batch), replace(layer, gate_proj=decoded_gate), batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_zero": None}, "gate_zero: got NoneType, expected an array"),
        (
            {"up_zero": np.zeros((E, I, 3), np.uint8)},
            rf"up_zero: got uint8 \[{E}, {I}, 3\], expected uint8 \[{E}, {I}, 2\]",
        ),
        (
            {"down_zero": np.full((E, H, 4), 32, np.uint8)},
            "down_zero: got 32 for expert 0, expected at most 31",
        ),
        (
            {"gate_scale": np.ones((E, I, 4), np.float16), "gate_zero": np.zeros((E, I, 4), np.uint8)},
            r"gate_scale: got float16 .*, expected float16 .* with G = 2 or 1",
        ),
        (
            {
                "down_scale": [np.ones((H, 4 if e else 2), np.float16) for e in range(E)],
                "down_zero": [np.zeros((H, 2), np.uint8)] * E,
            },
            "down_scale: got 4 groups for expert 1, expected 2, as for expert 0",
        ),
        ({"gate_scale": np.full((E, I, 2), 2.0**20, bf16)}, "gate_scale: got 1.04858e.06 in bfloat16"),
        ({"gate_global_scale": np.ones(E, np.float32)}, "gate_global_scale: got one, expected None"),
    ],
)
def test_wrong_arrays_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        f"{name}_{part}": array
        for name, (n, k) in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items()
        for part, array in {
            "proj": np.zeros((E, n, k // 2), np.uint8),
            "scale": np.ones((E, n, k // 64), np.float16),
            "zero": np.zeros((E, n, k // 64), np.uint8),
        }.items()
    }
    moe = KTMoEWrapper(0, E, P, H, I, method="INT4_ZP", group_size=64)
    with pytest.raises((TypeError, ValueError), match=message):
        moe.load_weights_from_tensors(**{**arguments, **change})
    assert not moe.loaded


def test_columns_that_are_no_blocks_are_refused() -> None:
    moe = KTMoEWrapper(0, E, P, 96, 64, method="INT4_ZP", group_size=64)
    zeros = np.zeros((E, 64, 48), np.uint8)
    with pytest.raises(ValueError, match="gate_proj: got 96 columns, expected a multiple of 64"):
        moe.load_weights_from_tensors(zeros, zeros, zeros)


def test_zero_points_for_another_method_are_refused() -> None:
    layer = draw_native_layer(np.random.default_rng(0), "RAWINT4", E, I, H)
    moe = KTMoEWrapper(0, E, P, H, I, method="RAWINT4")
    with pytest.raises(ValueError, match="gate_zero: got some, expected None: rawint4 has no zero points"):
        moe.load_weights_from_tensors(**layer.arguments, gate_zero=np.zeros((E, I, 4), np.uint8))
    plain = KTMoEWrapper(0, E, P, H, I)
    with pytest.raises(ValueError, match="gate_zero: got one, expected None: bfloat16 weights have no"):
        plain.load_weights_from_tensors(*layer.matrices, gate_zero=np.zeros((E, I, 4), np.uint8))


# ---- checkpoints ----


def put(directory: Path, encoding: str) -> native_checkpoints.Layer:
    """A model of one layer, with a config.json."""
    layer = draw_layer(encoding, E, I, H)
    put_layer(directory, layer)
    config = {"num_experts": E, "num_experts_per_tok": P, "hidden_size": H, "moe_intermediate_size": I}
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **config}))
    return layer


@pytest.mark.parametrize("encoding", FOUND)
def test_the_largest_blocks_that_divide_the_groups_are_found(tmp_path: Path, encoding: str) -> None:
    layer = put(tmp_path, encoding)
    num_groups = layer.matrices["gate_proj"][0].zero.shape[1]
    size = group_sizes(H)[num_groups]
    moe = KTMoEWrapper.from_pretrained(tmp_path, LAYER)
    assert (moe.method, moe.group_size) == ("INT4_ZP", min(size, 128))
    report = inspect_checkpoint(tmp_path).layers[0]
    assert (report.method, report.group_size) == ("INT4_ZP", moe.group_size)
    batch = draw_batch(np.random.default_rng(0), _plain(layer), 7, P)
    assert_close(moe.forward(*batch), _plain(layer), batch)
    smaller = KTMoEWrapper.from_pretrained(tmp_path, LAYER, group_size=32)
    assert_same_bits(smaller.forward(*batch), moe.forward(*batch))
    sft = KTMoEWrapper.from_pretrained(tmp_path, LAYER, mode="sft", lora_rank=4)
    assert (sft.method, sft.group_size) == ("INT4_ZP_SFT", moe.group_size)


def _plain(layer: native_checkpoints.Layer) -> Layer:
    """The decoded layer of a checkpoint."""
    return Layer(
        **{
            name: np.stack([decode_int4_zp(m.codes, m.scale, m.zero) for m in matrices])
            for name, matrices in layer.matrices.items()
        }
    )


def test_blocks_longer_than_the_groups_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "awq")
    with pytest.raises(ValueError, match="got INT4_ZP in groups of 32, expected groups of 64"):
        KTMoEWrapper.from_pretrained(tmp_path, LAYER, group_size=64)


@pytest.mark.parametrize("encoding", ["gptq", "gptq_v2", "rawint4"])
def test_symmetric_weights_have_the_zero_point_8(tmp_path: Path, encoding: str) -> None:
    layer = put(tmp_path, encoding)
    if encoding == "gptq_v2":
        options = {"sym": True, "checkpoint_format": "gptq_v2"}
        (tmp_path / "quantize_config.json").write_text(json.dumps(options))
    own = KTMoEWrapper.from_pretrained(tmp_path, LAYER)
    other = KTMoEWrapper.from_pretrained(tmp_path, LAYER, "INT4_ZP")
    assert (own.method, other.method) == (layer.method, "INT4_ZP")

    def plain(matrix: Any) -> AnyArray:
        if encoding == "rawint4":
            return decode_rawint4(matrix.codes, matrix.scale, 2 * matrix.codes.shape[1])
        return decode_gptq_int4(matrix.codes, matrix.scale)

    whole = Layer(**{name: np.stack([plain(m) for m in ms]) for name, ms in layer.matrices.items()})
    batch = draw_batch(np.random.default_rng(0), whole, 7, P)
    assert_same_bits(other.forward(*batch), whole.wrapper(P).forward(*batch))
