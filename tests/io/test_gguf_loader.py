"""The experts of GGUF models are found in every type and naming, without a copy."""

from __future__ import annotations

import doctest
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf")

from gguf_checkpoints import (  # noqa: E402
    LAYER,
    QUANTIZED,
    RANDOM,
    GgufLayer,
    config_of,
    draw_layer,
    raw,
    raw_key,
    raw_string,
    raw_tensor,
    write,
)

import ktmoe_np.formats.gguf  # noqa: E402
import ktmoe_np.io.gguf.checkpoint  # noqa: E402
import ktmoe_np.io.gguf.config  # noqa: E402
import ktmoe_np.io.gguf.experts  # noqa: E402
from ktmoe_np.formats.gguf import GGUF_FORMATS  # noqa: E402
from ktmoe_np.formats.weights import ExpertWeights  # noqa: E402
from ktmoe_np.io.gguf.experts import GgufCheckpoint, gguf_config, gguf_layers, load_gguf  # noqa: E402
from ktmoe_np.io.gguf.header import GGUF_TYPES  # noqa: E402

E, I, H = 3, 256, 512  # noqa: E741

KINDS = (*QUANTIZED, *RANDOM)
NAMINGS = ("stacked", "fused", "ungated", "single")

SIZES = {
    "qwen3moe.expert_count": E,
    "qwen3moe.expert_used_count": 2,
    "qwen3moe.embedding_length": H,
    "qwen3moe.expert_feed_forward_length": I,
    "qwen3moe.feed_forward_length": 4 * I,
}


@pytest.mark.parametrize(
    "module",
    [
        ktmoe_np.formats.gguf,
        ktmoe_np.io.gguf.experts,
        ktmoe_np.io.gguf.checkpoint,
        ktmoe_np.io.gguf.config,
    ],
)
def test_doctests(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_every_type_has_the_size_that_gguf_gives_it() -> None:
    sizes = {kind.value: (kind.name.lower(), *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    ours = {number: (kind.name, kind.block, kind.block_bytes) for number, kind in GGUF_TYPES.items()}
    assert {number: sizes[number] for number in ours if number in sizes} == {
        number: size for number, size in ours.items() if number in sizes
    }
    assert {"f32", "q4_k", "mxfp4"} <= {name for name, _, _ in ours.values()}
    for name, kind in GGUF_FORMATS.items():
        number = gguf.GGMLQuantizationType[name.upper()]
        assert GGUF_TYPES[number] is kind
        assert kind.row_bytes(768) == gguf.quants.quant_shape_to_byte_shape((768,), number)[0]


def assert_same(experts: ExpertWeights, layer: GgufLayer) -> None:
    """Byte for byte what was written."""
    assert list(experts.projections) == list(layer.matrices)
    for name, matrices in layer.matrices.items():
        projection = experts.projections[name]
        assert projection.format == layer.formats[name]
        assert len(projection.codes) == len(matrices)
        for data, matrix in zip(projection.codes, matrices, strict=True):
            assert data.dtype == np.uint8
            assert data.shape == matrix.shape
            assert data.flags.c_contiguous
            assert not data.flags.writeable
            assert np.array_equal(data, matrix)
    assert set(experts.biases) == set(layer.biases)
    for name, bias in layer.biases.items():
        assert experts.biases[name].dtype == np.float32
        assert experts.biases[name].flags.c_contiguous
        assert experts.biases[name].flags.aligned
        assert np.array_equal(experts.biases[name], bias)
    assert sorted(experts.names) == sorted(layer.tensors)


def activation_of(naming: str) -> str:
    return "relu2" if naming == "ungated" else "silu"


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_and_naming(tmp_path: Path, kind: str, naming: str) -> None:
    layer = draw_layer(kind, E, I, H, naming)
    path = tmp_path / "model.gguf"
    write(path, layer.tensors)
    checkpoint = GgufCheckpoint(path)
    assert gguf_layers(checkpoint) == (LAYER,)
    experts = load_gguf(checkpoint, LAYER, config_of(E, I, H, activation_of(naming)))
    assert_same(experts, layer)
    files = [checkpoint.tensor(name) for name in layer.tensors]
    for projection in experts.projections.values():
        for data in projection.codes:
            assert any(np.shares_memory(data, file) for file in files)


def test_a_type_for_each_projection(tmp_path: Path) -> None:
    layer = draw_layer({"gate": "q4_k", "up": "iq4_xs", "down": "q6_k"}, E, I, H)
    write(tmp_path / "model.gguf", layer.tensors)
    assert_same(load_gguf(str(tmp_path), LAYER, config_of(E, I, H)), layer)


@pytest.mark.parametrize("bias", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("naming", ["stacked", "fused", "ungated"])
def test_biases(tmp_path: Path, naming: str, bias: str) -> None:
    layer = draw_layer("q8_0", E, 32, 64, naming, bias=bias)
    write(tmp_path / "model.gguf", layer.tensors)
    assert_same(load_gguf(tmp_path, LAYER, config_of(E, 32, 64, activation_of(naming))), layer)


@given(
    st.sampled_from(["f16", "q4_0", "q5_1"]),
    st.sampled_from(NAMINGS),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([None, 8, 1024]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_size(
    tmp_path: Path, kind: str, naming: str, num_experts: int, inter: int, hidden: int, alignment: int | None
) -> None:
    layer = draw_layer(kind, num_experts, 32 * inter, 32 * hidden, naming)
    write(tmp_path / "model.gguf", layer.tensors, alignment=alignment)
    config = config_of(num_experts, 32 * inter, 32 * hidden, activation_of(naming))
    assert_same(load_gguf(tmp_path, LAYER, config), layer)


def test_a_single_expert_whose_dimension_is_not_written(tmp_path: Path) -> None:
    layer = draw_layer("q8_0", 1, 32, 64, bias="f32")
    write(tmp_path / "model.gguf", {name: (kind, data[0]) for name, (kind, data) in layer.tensors.items()})
    assert_same(load_gguf(tmp_path, LAYER, config_of(1, 32, 64)), layer)


def test_a_factor_of_whole_experts_is_left_to_the_router(tmp_path: Path) -> None:
    layer = draw_layer("q8_0", E, 32, 64)
    scale = ("f32", np.ones(E, np.float32).view(np.uint8))
    write(tmp_path / "model.gguf", {**layer.tensors, f"blk.{LAYER}.ffn_down_exps.scale": scale})
    assert_same(load_gguf(tmp_path, LAYER, config_of(E, 32, 64)), layer)


def test_other_tensors_are_none_of_the_loaders_business(tmp_path: Path) -> None:
    layer = draw_layer("q8_0", E, 32, 64)
    names = (
        "5.ffn_up_shexp",
        "5.ffn_gate_inp",
        "5.ffn_up_chexps",
        "6.ffn_down",
        "05.ffn_up_exps",
        "6.ffn_up.07",
    )
    other = ("iq1_s", np.zeros((2, 50), np.uint8))
    strangers = {f"blk.{name}.weight": other for name in names}
    write(tmp_path / "model.gguf", {**strangers, **layer.tensors})
    assert gguf_layers(tmp_path) == (LAYER,)
    assert_same(load_gguf(tmp_path, LAYER, config_of(E, 32, 64)), layer)


def test_a_split_model(tmp_path: Path) -> None:
    layer = draw_layer("q8_0", E, 32, 64, "single")
    write(tmp_path / "model.gguf", layer.tensors, SIZES, split=4)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for path in (tmp_path, *files):
        checkpoint = GgufCheckpoint(path)
        assert checkpoint.metadata("qwen3moe.expert_count") == E
        assert checkpoint.names() == tuple(layer.tensors)
        assert {checkpoint.file_of(name) for name in layer.tensors} == set(files)
        assert_same(load_gguf(checkpoint, LAYER, config_of(E, 32, 64)), layer)


def test_metadata(tmp_path: Path) -> None:
    written = {"a": 3, "b": 0.5, "c": True, "d": "für", "e": [1, 2], "f": ["x", ""], "g": [True, False]}
    write(tmp_path / "model.gguf", {}, written)
    checkpoint = GgufCheckpoint(tmp_path)
    assert {key: checkpoint.metadata(key) for key in written} == written
    assert set(written) < set(checkpoint.metadata_keys())
    assert checkpoint.metadata("h") is None
    assert checkpoint.names() == ()


def test_every_type_of_number(tmp_path: Path) -> None:
    numbers = {
        0: "u1",
        1: "i1",
        2: "<u2",
        3: "<i2",
        4: "<u4",
        5: "<i4",
        6: "<f4",
        7: "?",
        10: "<u8",
        11: "<i8",
    }
    keys = [
        raw_key(b"%d" % kind, kind, np.array(1, code).tobytes())
        for kind, code in {**numbers, 12: "<f8"}.items()
    ]
    (tmp_path / "model.gguf").write_bytes(raw([*keys, raw_key(b"odd", 7, b"\2")]))
    checkpoint = GgufCheckpoint(tmp_path)
    assert [checkpoint.metadata(key) for key in checkpoint.metadata_keys()] == [1] * len(keys) + [True]
    assert checkpoint.metadata("7") is True
    assert checkpoint.metadata("odd") is True
    assert type(checkpoint.metadata("12")) is float


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_of_every_rank(tmp_path: Path, version: int) -> None:
    entries = [raw_tensor(b"%d" % n, (4, 3, 2, 1)[:n], 0, 128 * n) for n in range(5)]
    (tmp_path / "model.gguf").write_bytes(raw([], entries, data=128 * 5, version=version))
    checkpoint = GgufCheckpoint(tmp_path)
    assert [checkpoint.info(name).shape for name in "01234"] == [(), (4,), (3, 4), (2, 3, 4), (1, 2, 3, 4)]
    assert [checkpoint.tensor(name).shape for name in "014"] == [(4,), (16,), (1, 2, 3, 16)]


def test_a_type_of_the_future_spoils_only_its_tensor(tmp_path: Path) -> None:
    entries = [raw_tensor(b"new", (7, 3), 99, 0), raw_tensor(b"old", (2,), 0, 32)]
    (tmp_path / "model.gguf").write_bytes(raw([], entries, data=40))
    checkpoint = GgufCheckpoint(tmp_path)
    assert checkpoint.info("new").type == "type 99"
    assert checkpoint.tensor("old").tolist() == [0] * 8


def test_a_long_vocabulary_is_stepped_over(tmp_path: Path) -> None:
    tokens = [f"token {number}" for number in range(1000)]
    write(tmp_path / "model.gguf", {}, {"tokens": tokens, "after": 7})
    checkpoint = GgufCheckpoint(tmp_path)
    assert checkpoint.metadata("after") == 7
    assert checkpoint.metadata("tokens") == tokens
    (tmp_path / "model.gguf").write_bytes(raw([raw_key(b"x", 9, b"\x08\0\0\0" + raw_string(b"", 0))]))
    assert GgufCheckpoint(tmp_path).metadata("x") == []


def test_views_outlive_the_checkpoint(tmp_path: Path) -> None:
    layer = draw_layer("q8_0", E, 32, 64)
    write(tmp_path / "model.gguf", layer.tensors)
    experts = load_gguf(tmp_path, LAYER, config_of(E, 32, 64))
    gc.collect()
    assert_same(experts, layer)


def test_a_shared_checkpoint_is_read_once_and_anew_when_it_changes(tmp_path: Path) -> None:
    layer = draw_layer("q8_0", E, 32, 64, "single")
    write(tmp_path / "model.gguf", layer.tensors, split=4)
    last = tmp_path / "model-00003-of-00003.gguf"
    first = GgufCheckpoint.shared(tmp_path)
    assert GgufCheckpoint.shared(str(tmp_path)) is first
    assert GgufCheckpoint.shared(last) is first
    assert GgufCheckpoint.opened(first) is first
    other, status = tmp_path / "other", last.stat()
    other.write_bytes(last.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy of a cache may have
    other.replace(last)
    assert GgufCheckpoint.shared(tmp_path) is not first


def test_a_shared_checkpoint_is_let_go_with_its_last_holder(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", {})
    holder = weakref.ref(GgufCheckpoint.shared(tmp_path))
    gc.collect()
    assert holder() is None


def config(path: Path, architecture: str, layer_idx: int = 1, **changes: Any) -> Any:
    values = {"expert_count": 8, "expert_used_count": 2, "embedding_length": 64, "feed_forward_length": 32}
    metadata = {f"{architecture}.{name}": value for name, value in {**values, **changes}.items()}
    write(path / "model.gguf", {}, metadata, architecture=architecture)
    return gguf_config(path, layer_idx)


def test_sizes_by_the_metadata(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", {}, SIZES)
    found = gguf_config(GgufCheckpoint(tmp_path), 7)
    assert (found.num_experts, found.num_experts_per_tok, found.hidden_size) == (E, 2, H)
    assert (found.moe_intermediate_size, found.layer_idx, found.activation.name) == (I, 7, "silu")
    assert config(tmp_path, "llama").moe_intermediate_size == 32
    assert config(tmp_path, "llama", feed_forward_length=[0, 96, 0]).moe_intermediate_size == 96
    assert config(tmp_path, "llama", expert_used_count=[1, 3]).num_experts_per_tok == 3
    assert config(tmp_path, "nemotron_h_moe", moe_latent_size=16).hidden_size == 16
    assert config(tmp_path, "nemotron_h_moe", moe_latent_size=0).hidden_size == 64


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("qwen3moe", "silu"),
        ("one-of-tomorrow", "silu"),
        ("gpt-oss", "swigluoai"),
        ("minimax-m3", "swigluoai"),
        ("gemma4", "gelu_tanh"),
        ("grok", "gelu_tanh"),
        ("nomic-bert-moe", "gelu_tanh_ungated"),
        ("nemotron_h_moe", "relu2"),
        ("smallthinker", "relu"),
    ],
)
def test_activations_by_architecture(tmp_path: Path, architecture: str, name: str) -> None:
    assert config(tmp_path, architecture).activation.name == name


def test_routing_weights_that_scale_inputs(tmp_path: Path) -> None:
    assert config(tmp_path, "llama4").scale_inputs
    assert not config(tmp_path, "llama").scale_inputs


def test_architectures_are_those_that_gguf_names() -> None:
    names = set(gguf.MODEL_ARCH_NAMES.values())
    known = {*ktmoe_np.io.gguf.config._ACTIVATIONS, *ktmoe_np.io.gguf.config._INPUT_SCALED}
    assert known - names <= {"minimax-m3"}  # younger than gguf 0.19
    without_gate = {
        gguf.MODEL_ARCH_NAMES[architecture]
        for architecture, tensors in gguf.MODEL_TENSORS.items()
        if gguf.MODEL_TENSOR.FFN_UP_EXP in tensors and gguf.MODEL_TENSOR.FFN_GATE_EXP not in tensors
    }
    assert without_gate == {"nomic-bert-moe", "nemotron_h_moe"}


@pytest.mark.parametrize(
    ("architecture", "clamp", "name", "limit"),
    [
        ("step35", [0.0, 7.0], "swiglustep", 7),
        ("step35", [7.0, 0.0], "silu", np.inf),
        ("deepseek4", 10.0, "silu", 10),
        ("deepseek4", [10, 12], "silu", 12),
    ],
)
def test_limits(tmp_path: Path, architecture: str, clamp: Any, name: str, limit: float) -> None:
    activation = config(tmp_path, architecture, swiglu_clamp_exp=clamp).activation
    assert (activation.name, activation.limit) == (name, limit)


def test_a_model_by_its_metadata_alone(tmp_path: Path) -> None:
    layer = draw_layer({"gate": "q4_k", "up": "q4_k", "down": "q6_k"}, E, I, H, "fused")
    write(tmp_path / "model.gguf", layer.tensors, SIZES)
    checkpoint = GgufCheckpoint.shared(tmp_path)
    assert_same(load_gguf(checkpoint, LAYER, gguf_config(checkpoint, LAYER)), layer)
