"""Layers on GGUF: what blocks stand for, files that are loaded and trained on, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_blocks import GGUF_BLOCKS
from layers import MANY_TOKENS, assert_close, assert_same_bits, bf16, draw_batch
from native_layers import NativeLayer, draw_gguf, draw_native_layer

from ktmoe_np import KTMoEWrapper
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.formats.gguf import GGUF_FORMATS
from ktmoe_np.reference import decode_gguf

pytestmark = pytest.mark.kernels

PLAIN = ("f32", "f16", "bf16")
every_type = pytest.mark.parametrize("name", [*PLAIN, *GGUF_BLOCKS])


def draw(rng: np.random.Generator, name: str, num_experts: int, inter: int, hidden: int) -> NativeLayer:
    """A layer with all its weights of one type."""
    arguments: dict[str, Any] = {}
    matrices = {}
    for role, (n, k) in {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}.items():
        drawn, matrices[f"{role}_proj"] = draw_gguf(rng, name, k**-0.5, num_experts, n, k)
        arguments |= {f"{role}_{part}": value for part, value in drawn.items()}
    return NativeLayer(**matrices, arguments=arguments)


# ---- what blocks stand for ----


@every_type
def test_the_reference_decodes_as_gguf_does(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name.upper()]
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    rows = np.random.default_rng(0).integers(0, 256, (3, 2, 500 * block_bytes), np.uint8)
    with np.errstate(all="ignore"):
        try:
            expected = gguf.quants.dequantize(rows, kind).astype(bf16)
        except NotImplementedError:
            pytest.skip(f"this version of gguf does not decode {kind.name}")
        actual = decode_gguf(rows, name)
    np.testing.assert_array_equal(actual.astype(np.float32), expected.astype(np.float32))


@every_type
@pytest.mark.parametrize(
    ("inter", "hidden", "tokens"), [(256, 512, 1), (768, 256, 9), (512, 2304, MANY_TOKENS)]
)
def test_every_type_in_widths_of_blocks(name: str, inter: int, hidden: int, tokens: int) -> None:
    rng = np.random.default_rng(1)
    layer = draw(rng, name, 2, inter, hidden)
    batch = draw_batch(rng, layer, tokens, 2)
    assert_close(layer.forward(batch, method="LLAMAFILE"), layer, batch)


def test_bits_of_q1_0_are_signs() -> None:
    block = np.frombuffer(np.float16(0.5).tobytes() + bytes([0b101, *14 * [0], 0x80]), np.uint8)
    weights = decode_gguf(block, "q1_0").astype(np.float32)
    assert weights.shape == (128,)
    assert np.flatnonzero(weights == 0.5).tolist() == [0, 2, 127]
    assert (np.delete(weights, [0, 2, 127]) == -0.5).all()


@pytest.mark.parametrize("name", [*PLAIN, *(name for name in GGUF_BLOCKS if GGUF_BLOCKS[name][0] == 32)])
@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_rows_that_end_inside_a_block_of_256(name: str, tokens: int) -> None:
    rng = np.random.default_rng(2)
    layer = draw(rng, name, 2, 704, 96)
    batch = draw_batch(rng, layer, tokens, 2)
    assert_close(layer.forward(batch, method="LLAMAFILE"), layer, batch)


@pytest.mark.parametrize("name", GGUF_BLOCKS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_scales_of_any_size(name: str, tokens: int) -> None:
    """Infinite, not a number, denormal: a row's results are those of its decoded weights."""
    rng = np.random.default_rng(3)
    layer = draw(rng, name, 1, 256, 256)
    rows = layer.arguments["gate_proj"]
    _, block_bytes, halves, _ = GGUF_BLOCKS[name]
    strange = np.float16([np.inf, np.nan, 6e-8, 0.0, -65504.0])
    for row, scale in enumerate(strange):
        for at in halves:
            rows.reshape(1, 256, -1, block_bytes)[0, row, :, at : at + 2] = scale.reshape(1).view(np.uint8)
    moe = KTMoEWrapper(0, 1, 1, 256, 256, method="LLAMAFILE")
    plain = KTMoEWrapper(0, 1, 1, 256, 256)
    for at in range(len(strange)):  # an infinite gate alone: others would hide behind its NaN
        gate = rows.copy()
        gate[0, [row for row in range(len(strange)) if row != at]] = rows[0, 10]
        with np.errstate(all="ignore"):
            decoded = decode_gguf(gate, layer.arguments["gate_format"].lower())
        moe.load_weights_from_tensors(**{**layer.arguments, "gate_proj": gate})
        plain.load_weights_from_tensors(decoded, *layer.matrices[1:])
        batch = draw_batch(rng, layer, tokens, 1)
        assert_same_bits(moe.forward(*batch), plain.forward(*batch))


def test_products_have_the_bits_of_decoded_weights() -> None:
    rng = np.random.default_rng(4)
    layer = draw_native_layer(rng, "LLAMAFILE", 4, 768, 1024, "swigluoai", with_biases=True)
    for tokens in (1, 3, 40, 300):
        batch = draw_batch(rng, layer, tokens, 2)
        plain = KTMoEWrapper(0, 4, 2, 1024, 768, activation="swigluoai")
        plain.load_weights_from_tensors(*layer.matrices, **layer.biases)
        assert_same_bits(layer.forward(batch, method="LLAMAFILE"), plain.forward(*batch))


# ---- files ----


@pytest.mark.parametrize("split", [0, 2])
@pytest.mark.parametrize("naming", ["stacked", "fused", "single"])
def test_a_model_is_loaded_and_trained_on_by_its_path(tmp_path: Path, naming: str, split: int) -> None:
    pytest.importorskip("gguf")
    from gguf_checkpoints import LAYER, draw_layer, write

    drawn = draw_layer({"gate": "q5_k", "up": "q5_k", "down": "q6_k"}, 3, 256, 512, naming)
    sizes = {"expert_count": 3, "expert_used_count": 2, "embedding_length": 512}
    metadata = {
        f"qwen3moe.{key}": value for key, value in (sizes | {"expert_feed_forward_length": 256}).items()
    }
    write(tmp_path / "model.gguf", drawn.tensors, metadata, split=split)
    matrices = {name: decode_gguf(drawn.matrices[name], drawn.formats[name]) for name in drawn.matrices}
    layer = NativeLayer(**matrices)
    moe = KTMoEWrapper.from_pretrained(tmp_path, LAYER)
    assert (type(moe).__name__, moe.method, moe.loaded) == ("LlamafileMoEWrapper", "LLAMAFILE", True)
    assert moe.expert_bytes == 2 * 256 * 512 // 256 * 176 + 512 * 210
    rng = np.random.default_rng(5)
    batch = draw_batch(rng, layer, 9, 2)
    assert_close(moe.forward(*batch), layer, batch)
    path = next(tmp_path.glob("*.gguf"))
    sft = KTMoEWrapper.from_pretrained(path, LAYER, mode="sft", lora_rank=4)
    assert (type(sft).__name__, sft.method) == ("LlamafileSFTMoEWrapper", "LLAMAFILE_SFT")
    sft.init_lora_weights()
    assert_same_bits(sft.forward_sft(*batch), moe.forward(*batch))
    assert np.isfinite(sft.backward(np.ones_like(batch.x)).gate_lora_b).all()


def test_a_file_is_mapped_and_not_copied(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from gguf_checkpoints import LAYER, draw_layer, write

    drawn = draw_layer("q8_0", 2, 32, 64)
    write(tmp_path / "model.gguf", drawn.tensors)
    moe = KTMoEWrapper(LAYER, 2, 1, 64, 32, method="LLAMAFILE", weight_path=tmp_path / "model.gguf")
    moe.load_weights(np.array([1, 0]))
    batch = draw_batch(np.random.default_rng(6), NativeLayer(*drawn.matrices.values()), 3, 1)
    before = moe.forward(*batch)
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    at = data.index(drawn.matrices["down_proj"][0, 0].tobytes())
    with (tmp_path / "model.gguf").open("r+b") as file:
        file.seek(at + 2)
        file.write(bytes(32))  # the first row of the down projection becomes zeros
    after = moe.forward(*batch)
    assert (after[:, 0] == 0).any()
    assert_same_bits(after[:, 2:], before[:, 2:])


# ---- arrays ----


def test_numbers_say_themselves_what_they_are() -> None:
    rng = np.random.default_rng(7)
    values = [
        rng.standard_normal(shape).astype(np.float32) / 6 for shape in ((2, 30, 50), (2, 30, 50), (2, 50, 30))
    ]
    moe = KTMoEWrapper(0, 2, 1, 50, 30, method="LLAMAFILE")
    moe.load_weights_from_tensors(values[0], values[1].astype(np.float16), list(values[2].astype(bf16)))
    assert moe.expert_bytes == 30 * 50 * (4 + 2 + 2)
    layer = NativeLayer(
        values[0].astype(bf16), values[1].astype(np.float16).astype(bf16), values[2].astype(bf16)
    )
    batch = draw_batch(rng, layer, 9, 1)
    assert_close(moe.forward(*batch), layer, batch)


def test_types_by_the_enumeration_of_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(8)
    layer = draw(rng, "q4_k", 2, 256, 256)
    batch = draw_batch(rng, layer, 5, 1)
    q4_k = gguf.GGMLQuantizationType.Q4_K
    moe = KTMoEWrapper(0, 2, 1, 256, 256, method="LLAMAFILE")
    given = {**layer.arguments, **{f"{role}_format": q4_k for role in ("gate", "up", "down")}}
    moe.load_weights_from_tensors(**given)
    assert_same_bits(moe.forward(*batch), layer.forward(batch, method="LLAMAFILE"))


# ---- errors ----

KNOWN = ", ".join(GGUF_FORMATS)


@pytest.mark.parametrize("method", ["LLAMAFILE", "LLAMAFILE_SFT"])
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"down_format": "Q8_K"}, ValueError, f"down_format: got 'q8_k', expected one of {KNOWN}"),
        ({"gate_format": None}, ValueError, f"gate_format: got None, expected one of {KNOWN}"),
        ({"up_format": "fp8"}, ValueError, f"up_format: got 'fp8', expected one of {KNOWN}"),
        ({"gate_format": "q4_1"}, ValueError, "gate_proj: got uint8 [2, 64, 54], expected uint8 [2, 64, 60]"),
        (
            {"gate_format": "q4_k"},
            ValueError,
            "gate_proj: got rows of 96 values, expected a multiple of 256, a block of q4_k",
        ),
        ({"up_proj": None}, TypeError, "up_proj: got NoneType, expected an array"),
        (
            {"down_proj": np.zeros((2, 96, 36), np.int8)},
            TypeError,
            "down_proj: got int8 [2, 96, 36], expected uint8 [2, 96, 36]",
        ),
        ({"gate_proj": [np.zeros((64, 54), np.uint8)]}, ValueError, "gate_proj: got 1 arrays, expected 2"),
    ],
)
def test_wrong_arguments(method: str, changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    rng = np.random.default_rng(9)
    layer = draw(rng, "q4_0", 2, 64, 96)
    mode = {"mode": "sft", "lora_rank": 2} if method.endswith("SFT") else {}
    moe: Any = KTMoEWrapper(0, 2, 1, 96, 64, method=method, **mode)
    layer.load_into(moe)
    batch = draw_batch(rng, layer, 5, 1)
    run = moe.forward_sft if mode else moe.forward
    before = run(*batch, **({"save_for_backward": False} if mode else {}))
    with pytest.raises(kind, match=re.escape(message)):
        moe.load_weights_from_tensors(**{**layer.arguments, **changes})
    after = run(*batch, **({"save_for_backward": False} if mode else {}))
    assert_same_bits(after, before)
    assert moe.expert_bytes == 3 * 64 * 96 // 32 * 18


def test_a_layer_without_a_gate_has_no_up() -> None:
    rng = np.random.default_rng(10)
    layer = draw(rng, "q4_0", 2, 64, 96)
    moe = KTMoEWrapper(0, 2, 1, 96, 64, method="LLAMAFILE", activation="relu2")
    gate, down = layer.arguments["gate_proj"], layer.arguments["down_proj"]
    with pytest.raises(ValueError, match="up_proj: got one, expected None: the activation is not gated"):
        moe.load_weights_from_tensors(gate, gate, down, gate_format="q4_0", down_format="q4_0")
    with pytest.raises(ValueError, match="up_format: got one, expected None: the activation is not gated"):
        moe.load_weights_from_tensors(
            gate, None, down, gate_format="q4_0", up_format="q4_0", down_format="q4_0"
        )


def test_other_methods_have_one_format() -> None:
    moe = KTMoEWrapper(0, 1, 1, 32, 32, method="FP8")
    rows = np.zeros((1, 32, 32), np.uint8)
    with pytest.raises(ValueError, match="gate_format: got 'q4_0', expected None: the layer has one format"):
        moe._layer.load_weights_task(ext.moe.Projection(rows, format="q4_0"), rows, rows)


def test_bytes_are_told_by_weights_that_are_there() -> None:
    moe = KTMoEWrapper(0, 1, 1, 32, 32, method="LLAMAFILE")
    with pytest.raises(RuntimeError, match="expert_bytes: nothing is loaded"):
        _ = moe.expert_bytes


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        (np.zeros(18, np.uint8), "q8_k", "type_name: got 'q8_k', expected one of f32, f16"),
        (np.zeros(19, np.uint8), "q4_0", "data: got rows of 19 bytes, expected a multiple of 18 of q4_0"),
    ],
)
def test_the_reference_refuses(rows: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_gguf(rows, name)
