"""Natively quantized experts are found in every encoding and naming, without a copy."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_checkpoints import ENCODINGS, LAYER, NAMINGS, Layer, config_of, draw_layer, put_layer

import ktmoe_np.io.native
from ktmoe_np.formats.weights import ExpertWeights
from ktmoe_np.io import SafetensorsCheckpoint
from ktmoe_np.io.native import load_native, native_method
from ktmoe_np.io.safetensors.writer import write_safetensors as write_aligned

E, I, H = 3, 96, 160  # noqa: E741

SEPARATE = [name for name in ENCODINGS if name not in ("gpt_oss", "step")]


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.io.native).failed == 0


def assert_same(experts: ExpertWeights, layer: Layer) -> None:
    """Byte for byte what was written."""
    assert experts.method == layer.method
    assert list(experts.projections) == list(layer.matrices)
    for name, matrices in layer.matrices.items():
        projection = experts.projections[name]
        assert len(projection.codes) == len(projection.scales) == len(matrices)
        for codes, scale, matrix in zip(projection.codes, projection.scales, matrices, strict=True):
            assert codes.dtype == matrix.codes.dtype
            assert codes.strides[1] == codes.itemsize
            assert np.array_equal(codes, matrix.codes)
            assert scale.dtype == matrix.scale.dtype
            assert scale.shape == matrix.scale.shape
            assert scale.tobytes() == matrix.scale.tobytes()
            assert scale.flags.c_contiguous
            assert scale.flags.aligned
        if layer.method == "NVFP4":
            assert projection.global_scale is not None
            assert projection.global_scale.dtype == np.float32
            assert projection.global_scale.tolist() == [matrix.factor for matrix in matrices]
        else:
            assert projection.global_scale is None
        if layer.method == "INT4_ZP":
            assert projection.zero_points is not None
            zeros = [matrix.zero for matrix in matrices]
            assert np.array_equal(np.stack(projection.zero_points), np.stack(zeros))
        else:
            assert projection.zero_points is None
    assert set(experts.biases) == set(layer.biases)
    for name, bias in layer.biases.items():
        assert experts.biases[name].dtype == np.float32
        assert experts.biases[name].flags.c_contiguous
        assert np.array_equal(experts.biases[name], bias.astype(np.float32))
    used = {name for name in layer.tensors if not name.endswith(".input_scale")}
    assert set(experts.names) == used
    assert len(experts.names) == len(used)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding(tmp_path: Path, encoding: str) -> None:
    layer = draw_layer(encoding, E, I, H)
    path = put_layer(tmp_path, layer)
    config = config_of(E, I, H)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert native_method(checkpoint, LAYER) == native_method(path, LAYER) == layer.method
    assert_same(load_native(checkpoint, LAYER, config), layer)
    assert_same(load_native(str(path), LAYER, config, layer.method), layer)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("encoding", ["fp8", "rawint4", "gptq", "mxfp4_deepseek_v4", "nvfp4_modelopt"])
def test_every_naming(tmp_path: Path, encoding: str, naming: str) -> None:
    layer = draw_layer(encoding, E, I, H, naming)
    put_layer(tmp_path, layer)
    assert native_method(tmp_path, LAYER) == layer.method
    assert_same(load_native(tmp_path, LAYER, config_of(E, I, H, naming)), layer)


@given(st.sampled_from(sorted(ENCODINGS)), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_size(tmp_path: Path, encoding: str, num_experts: int, inter: int, hidden: int) -> None:
    layer = draw_layer(encoding, num_experts, 32 * inter, 32 * hidden)
    put_layer(tmp_path, layer)
    config = config_of(num_experts, 32 * inter, 32 * hidden)
    assert_same(load_native(tmp_path, LAYER, config, layer.method), layer)


@pytest.mark.parametrize("encoding", ["fp8", "fp8_bf16", "fp8_compressed_tensors", "fp8_deepseek_v4", "step"])
@pytest.mark.parametrize(("inter", "hidden"), [(704, 131), (705, 384), (1, 1), (127, 129)])
def test_ragged_blocks(tmp_path: Path, encoding: str, inter: int, hidden: int) -> None:
    layer = draw_layer(encoding, 2, inter, hidden)
    put_layer(tmp_path, layer)
    experts = load_native(tmp_path, LAYER, config_of(2, inter, hidden), "FP8")
    assert_same(experts, layer)
    blocks = (-(-inter // 128), -(-hidden // 128))
    assert experts.projections["up_proj"].scales[1].shape == blocks
    assert experts.projections["down_proj"].scales[1].shape == blocks[::-1]


@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if ENCODINGS[name][0] != "INT4_ZP"])
def test_nothing_is_copied(tmp_path: Path, encoding: str) -> None:
    layer = draw_layer(encoding, E, I, H)
    write_aligned(tmp_path / "model.safetensors", layer.tensors)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    experts = load_native(checkpoint, LAYER, config_of(E, I, H))
    files = [checkpoint.tensor(name) for name in experts.names]

    def is_view(array: np.ndarray) -> bool:
        return any(np.shares_memory(array, tensor) for tensor in files)

    converted = encoding in ("fp8_bf16", "fp8_channel_bf16", "fp8_deepseek_v4", "fp8_tensor", "gptq_bf16")
    for name, projection in experts.projections.items():
        assert all(is_view(codes) and not codes.flags.writeable for codes in projection.codes)
        interleaved = encoding == "gpt_oss" and name != "down_proj"
        assert [is_view(scale) for scale in projection.scales] == [not (converted or interleaved)] * E
        first = projection.codes[0]
        row_bytes = first.shape[1] * first.itemsize
        assert first.strides == ((2 if interleaved else 1) * row_bytes, first.itemsize)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_misaligned_tensors(tmp_path: Path, encoding: str) -> None:
    layer = draw_layer(encoding, E, I, H)
    path = put_layer(tmp_path, layer)
    for padding in range(1, 4):
        write_safetensors(path, {"odd": np.zeros(padding, np.uint8), **layer.tensors})
        checkpoint = SafetensorsCheckpoint(path)
        experts = load_native(checkpoint, LAYER, config_of(E, I, H))
        assert_same(experts, layer)
        files = [checkpoint.tensor(name) for name in experts.names]
        for projection in experts.projections.values() if layer.method != "INT4_ZP" else ():
            assert all(any(np.shares_memory(c, file) for file in files) for c in projection.codes)


@pytest.mark.parametrize("encoding", ["fp8", "rawint4", "gptq", "nvfp4_packed"])
def test_biases_of_separate_experts(tmp_path: Path, encoding: str) -> None:
    layer = draw_layer(encoding, E, I, H, biases=True)
    put_layer(tmp_path, layer)
    assert_same(load_native(tmp_path, LAYER, config_of(E, I, H)), layer)


def test_biases_of_several_dtypes(tmp_path: Path) -> None:
    layer = draw_layer("fp8", E, I, H, biases=True)
    for e, dtype in enumerate((np.float16, np.float32)):
        name = f"model.layers.{LAYER}.mlp.experts.{e}.up_proj.bias"
        layer.tensors[name] = layer.tensors[name].astype(dtype)
    put_layer(tmp_path, layer)
    assert_same(load_native(tmp_path, LAYER, config_of(E, I, H)), layer)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("encoding", ["nvfp4_modelopt", "nvfp4_packed", "fp8_tensor"])
def test_scalars_of_both_shapes(tmp_path: Path, encoding: str, shape: tuple[int, ...]) -> None:
    layer = draw_layer(encoding, E, I, H)
    for name, array in layer.tensors.items():
        if array.size == 1:
            layer.tensors[name] = array.reshape(shape)
    put_layer(tmp_path, layer)
    assert_same(load_native(tmp_path, LAYER, config_of(E, I, H)), layer)


@pytest.mark.parametrize("encoding", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("inter", "hidden"), [(704, 288), (32, 64)])
def test_last_groups_in_part(tmp_path: Path, encoding: str, inter: int, hidden: int) -> None:
    layer = draw_layer(encoding, 2, inter, hidden)
    put_layer(tmp_path, layer)
    assert_same(load_native(tmp_path, LAYER, config_of(2, inter, hidden)), layer)


def test_a_factor_of_zero_stays_zero(tmp_path: Path) -> None:
    layer = draw_layer("nvfp4_modelopt", E, I, H)
    name = f"model.layers.{LAYER}.mlp.experts.1.up_proj.weight_scale_2"
    layer.tensors[name] = np.zeros((), np.float32)
    put_layer(tmp_path, layer)
    scale = load_native(tmp_path, LAYER, config_of(E, I, H)).projections["up_proj"].global_scale
    assert scale is not None
    assert scale[1] == 0


def test_layers_that_are_not_native(tmp_path: Path) -> None:
    for naming in ("qwen3_moe", "gpt_oss", "llama4", "step3p5", "nemotron_h"):
        write_checkpoint(tmp_path / naming, naming, [0, 2], 2, 32, 32)
        assert [native_method(tmp_path / naming, number) for number in (0, 1, -1)] == [None] * 3


def test_the_method_is_that_of_most_tensors(tmp_path: Path) -> None:
    """One damaged tensor does not make a layer another's."""
    for encoding in SEPARATE:
        layer = draw_layer(encoding, E, I, H)
        for name in list(layer.tensors):
            if name.endswith(".input_scale"):
                continue
            kept = layer.tensors.pop(name)
            put_layer(tmp_path, layer)
            assert native_method(tmp_path, LAYER) == layer.method
            layer.tensors[name] = np.zeros((7, 7), ml_dtypes.bfloat16)
            put_layer(tmp_path, layer)
            assert native_method(tmp_path, LAYER) == layer.method
            layer.tensors[name] = kept


def test_shards(tmp_path: Path) -> None:
    layer = draw_layer("fp8", E, I, H)
    weight_map = {name: f"{number % 3}.safetensors" for number, name in enumerate(layer.tensors)}
    for shard in set(weight_map.values()):
        part = {name: array for name, array in layer.tensors.items() if weight_map[name] == shard}
        write_safetensors(tmp_path / shard, part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load_native(tmp_path, LAYER, config_of(E, I, H)), layer)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.safetensors"):
        load_native(tmp_path, LAYER, config_of(E, I, H))
