"""Finding a layer's experts: every naming, without a copy where possible."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import NAMINGS, draw_experts, layer_tensors, write_checkpoint, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import ktmoe_np.io.experts
from ktmoe_np.config import MoEConfig
from ktmoe_np.io import (
    ExpertWeights,
    SafetensorsCheckpoint,
    SafetensorsFile,
    expert_layers,
    load_experts,
    load_hf_config,
)
from ktmoe_np.reference import moe_forward

AnyArray = NDArray[Any]

E, I, H = 3, 10, 6  # noqa: E741

#: Namings whose matrices are [K, N] in the file, which costs a copy.
TRANSPOSED = ("llama4", "qwen3_vl_moe", "aria", "gpt_oss")


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.io.experts).failed == 0


def assert_same(experts: ExpertWeights, layer: dict[str, AnyArray | None]) -> None:
    """Bit for bit the weights that were written."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        want = layer[name]
        if want is None:
            assert name not in experts.projections
            continue
        got = experts.projections[name].codes
        assert isinstance(got, list)
        assert all(expert.dtype == ml_dtypes.bfloat16 for expert in got)
        assert np.array_equal(np.stack(got).view(np.uint16), want.view(np.uint16))
    for name in ("gate_bias", "up_bias", "down_bias"):
        bias, got_bias = layer.get(name), experts.biases.get(name.replace("_bias", "_proj"))
        if bias is None:
            assert got_bias is None
        else:
            assert got_bias.dtype == np.float32
            assert np.array_equal(got_bias, bias.astype(np.float32))


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("num_shards", [1, 4])
def test_every_naming(tmp_path: Path, naming: str, num_shards: int) -> None:
    layers = write_checkpoint(tmp_path, naming, [0, 3, 31], E, I, H, num_shards=num_shards)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert expert_layers(checkpoint) == (0, 3, 31)
    for number, layer in layers.items():
        config = MoEConfig.from_hf_config(load_hf_config(tmp_path), number)
        for experts in (load_experts(checkpoint, number), load_experts(tmp_path, number, config)):
            assert_same(experts, layer)
            assert (experts.num_experts, *experts.down.codes[0].shape) == (E, H, I)
            assert all(name in checkpoint for name in experts.names)
            assert all(f".{number}." in name for name in experts.names)


@given(st.sampled_from(sorted(NAMINGS)), st.integers(1, 12), st.integers(1, 70), st.integers(1, 70))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_size(tmp_path: Path, naming: str, num_experts: int, inter: int, hidden: int) -> None:
    layers = write_checkpoint(tmp_path, naming, [2], num_experts, inter, hidden)
    assert_same(load_experts(tmp_path, 2), layers[2])


@pytest.mark.parametrize("naming", NAMINGS)
def test_nothing_is_copied_where_k_is_contiguous(tmp_path: Path, naming: str) -> None:
    write_checkpoint(tmp_path, naming, [0], E, I, H)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    experts = load_experts(checkpoint, 0)
    files = [checkpoint.tensor(name) for name in experts.names]
    for matrices in (projection.codes for projection in experts.projections.values()):
        for matrix in matrices:
            assert matrix.strides[1] == 2
            shared = any(np.shares_memory(matrix, tensor) for tensor in files)
            assert shared == (naming not in TRANSPOSED)
            assert shared == (not matrix.flags.writeable)
    assert experts.gate.codes[0].strides[0] == (4 * H if naming == "inkling" else 2 * H)


def test_the_layer_runs(tmp_path: Path) -> None:
    for naming in NAMINGS:
        layer = write_checkpoint(tmp_path / naming, naming, [1], E, I, H)[1]
        config = MoEConfig.from_hf_config(load_hf_config(tmp_path / naming), 1)
        experts = load_experts(tmp_path / naming, 1, config)
        x = np.random.default_rng(0).standard_normal((4, H)).astype(np.float32).astype(ml_dtypes.bfloat16)
        ids, weights = np.array([[0, 2], [1, 1], [2, 0], [-1, 1]]), np.full((4, 2), 0.5, np.float32)
        got = moe_forward(x, ids, weights, **experts.arguments(), activation=config.activation)
        want = moe_forward(x, ids, weights, activation=config.activation, **layer)  # type: ignore[arg-type]
        assert np.array_equal(got.view(np.uint16), want.view(np.uint16))


def test_a_misaligned_tensor_is_copied(tmp_path: Path) -> None:
    layer = draw_experts("qwen3_moe", (E, I, H), np.random.default_rng(0))
    tensors = {f"model.layers.0.{name}": array for name, array in layer_tensors("qwen3_moe", layer).items()}
    write_safetensors(tmp_path / "model.safetensors", {"odd": np.zeros(1, np.uint8), **tensors})
    experts = load_experts(tmp_path, 0)
    assert_same(experts, layer)
    assert all(matrix.flags.aligned for matrix in experts.gate.codes)


def test_biases_of_separate_experts(tmp_path: Path) -> None:
    layer = draw_experts("gpt_oss", (E, I, H), np.random.default_rng(0))
    tensors = layer_tensors("qwen3_moe", layer)
    for role in ("gate", "up", "down"):
        bias = layer[f"{role}_bias"]
        assert bias is not None
        tensors |= {f"mlp.experts.{e}.{role}_proj.bias": bias[e] for e in range(E)}
    tensors = {f"model.layers.0.{name}": array for name, array in tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert_same(load_experts(tmp_path, 0), layer)
    for e, dtype in enumerate((np.float16, np.float32)):  # whatever the others are
        name = f"model.layers.0.mlp.experts.{e}.down_proj.bias"
        tensors[name] = np.full(H, e + 0.5, dtype)
        layer["down_bias"][e] = e + 0.5
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert_same(load_experts(tmp_path, 0), layer)
    del tensors["model.layers.0.mlp.experts.1.up_proj.bias"]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    missing = (
        r"tensor 'model\.layers\.0\.mlp\.experts\.1\.up_proj\.bias': got none, expected BF16 or .* \[10\]"
    )
    with pytest.raises(ValueError, match=missing):
        load_experts(tmp_path, 0)


def test_a_layer_opens_only_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", range(8), E, I, H, num_shards=8)
    opened: list[str] = []
    original = SafetensorsFile.__init__

    def spy(self: SafetensorsFile, path: Path) -> None:
        opened.append(Path(path).name)
        original(self, path)

    monkeypatch.setattr(SafetensorsFile, "__init__", spy)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    load_experts(checkpoint, 3)
    assert set(opened) <= {"model-00004-of-00008.safetensors", "model-00005-of-00008.safetensors"}
    count = len(opened)
    load_experts(checkpoint, 3)
    assert len(opened) == count
