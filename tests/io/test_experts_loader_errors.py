"""What is wrong with a layer's experts is said by file, tensor, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import NAMINGS, draw_experts, layer_tensors, write_checkpoint, write_safetensors
from numpy.typing import NDArray

from ktmoe_np.config import MoEConfig, parse_activation
from ktmoe_np.io import (
    load_experts,
)

AnyArray = NDArray[Any]

E, I, H = 3, 10, 6  # noqa: E741

Change = Callable[[dict[str, AnyArray]], object]
STEM = "mlp.experts.1"


def put(name: str, array: AnyArray) -> Change:
    return lambda tensors: tensors.update({name: array})


def drop(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in names]


def zeros(*shape: int, dtype: Any = ml_dtypes.bfloat16) -> AnyArray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("naming", "change", "message"),
    [
        (
            "qwen3_moe",
            drop(f"{STEM}.up_proj.weight"),
            r"tensor 'model\.layers\.7\.mlp\.experts\.1\.up_proj\.weight': got none, .* BF16 \[10, 6\]",
        ),
        (
            "qwen3_moe",
            drop("mlp.experts.2.down_proj.weight"),
            r"tensor 'model\.layers\.7\.mlp\.experts\.2\.down_proj\.weight': got none, .* BF16 \[6, 10\]",
        ),
        (
            "qwen3_moe",
            drop(*(f"mlp.experts.0.{name}_proj.weight" for name in ("gate", "up", "down"))),
            r"tensor 'model\.layers\.7\.mlp\.experts\.0\.down_proj\.weight': got none",
        ),
        (
            "qwen3_moe",
            drop(*(f"{STEM}.{name}_proj.weight" for name in ("gate", "up", "down"))),
            r"tensor 'model\.layers\.7\.mlp\.experts\.1\.gate_proj\.weight': got none",
        ),
        (
            "qwen3_moe",
            drop(*(f"mlp.experts.{e}.up_proj.weight" for e in range(E))),
            r"tensor 'model\.layers\.7\.mlp\.experts\.0\.up_proj\.weight': got none",
        ),
        (
            "qwen3_moe",
            put(f"{STEM}.gate_proj.weight", zeros(I, H + 1)),
            r"model\.safetensors: tensor '.*1\.gate.*': got BF16 \[10, 7\], expected BF16 \[10, 6\]",
        ),
        (
            "qwen3_moe",
            put(f"{STEM}.gate_proj.weight", zeros(I, H, dtype=np.float32)),
            r"tensor '.*1\.gate_proj\.weight': got F32 \[10, 6\], expected BF16 \[10, 6\]",
        ),
        (
            "qwen3_moe",
            put(f"{STEM}.down_proj.weight", zeros(H, I, dtype=ml_dtypes.float8_e4m3fn)),
            r"tensor '.*1\.down_proj\.weight': got F8_E4M3 \[6, 10\], expected BF16 \[6, 10\]",
        ),
        (
            "qwen3_moe",
            put("mlp.experts.0.down_proj.weight", zeros(H * I)),
            r"tensor '.*0\.down_proj\.weight': got shape \[60\], expected \[H, I\]",
        ),
        (
            "qwen3_5_moe",
            put("mlp.experts.gate_up_proj", zeros(E, 2 * I + 1, H)),
            r"gate_up_proj': got BF16 \[3, 21, 6\], expected BF16 \[3, 20, 6\]",
        ),
        (
            "qwen3_5_moe",
            put("mlp.experts.down_proj", zeros(E * H, I)),
            r"down_proj': got shape \[18, 10\], expected \[E, H, I\]",
        ),
        ("qwen3_5_moe", drop("mlp.experts.down_proj"), "down_proj': got none"),
        (
            "qwen3_5_moe",
            drop("mlp.experts.gate_up_proj"),
            r"gate_up_proj': got none, expected BF16 or F32 or F16 \[3, 20, 6\]",
        ),
        (
            "llama4",
            put("feed_forward.experts.gate_up_proj", zeros(E, 2 * I, H)),
            r"gate_up_proj': got BF16 \[3, 20, 6\], expected BF16 \[3, 6, 20\]",
        ),
        (
            "llama4",
            put("feed_forward.experts.down_proj", zeros(2)),
            r"down_proj': got shape \[2\], expected \[E, I, H\]",
        ),
        (
            "gpt_oss",
            drop("mlp.experts.down_proj_bias"),
            r"down_proj_bias': got none, expected BF16 or F16 or F32 \[3, 6\]",
        ),
        (
            "nemotron_h",
            drop("mixer.experts.1.up_proj.weight"),
            r"tensor 'backbone\.layers\.7\.mixer\.experts\.1\.up_proj\.weight': got none",
        ),
    ],
)
def test_wrong_tensors(tmp_path: Path, naming: str, change: Change, message: str) -> None:
    tensors = layer_tensors(naming, draw_experts(naming, (E, I, H), np.random.default_rng(0)))
    change(tensors)
    prefix = NAMINGS[naming][0]
    write_safetensors(
        tmp_path / "model.safetensors", {f"{prefix}.7.{name}": array for name, array in tensors.items()}
    )
    with pytest.raises(ValueError, match=message) as raised:
        load_experts(tmp_path, 7)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((E - 1, I, H), r"tensor '.*experts\.2\.gate_proj\.weight': got one, expected 2 experts"),
        ((E + 1, I, H), r"tensor '.*experts\.3\.gate_proj\.weight': got none, expected BF16 \[10, 6\]"),
        ((E, I + 1, H), r"gate_proj\.weight': got BF16 \[10, 6\], expected BF16 \[11, 6\]"),
        ((E, I, H + 1), r"gate_proj\.weight': got BF16 \[10, 6\], expected BF16 \[10, 7\]"),
    ],
)
def test_other_sizes_than_the_config(tmp_path: Path, sizes: tuple[int, int, int], message: str) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], E, I, H)
    with pytest.raises(ValueError, match=message):
        load_experts(tmp_path, 0, MoEConfig(sizes[0], 2, sizes[2], sizes[1]))


@pytest.mark.parametrize(
    ("naming", "activation", "message"),
    [
        (
            "qwen3_moe",
            "relu2",
            "experts under 'model.layers.0.' have a gate, but activation relu2 is not gated",
        ),
        (
            "nemotron_h",
            "silu",
            "experts under 'backbone.layers.0.' have no gate, but activation silu is gated",
        ),
    ],
)
def test_other_projections_than_the_activation(
    tmp_path: Path, naming: str, activation: str, message: str
) -> None:
    write_checkpoint(tmp_path, naming, [0], E, I, H)
    with pytest.raises(ValueError, match=message):
        load_experts(tmp_path, 0, MoEConfig(E, 2, H, I, parse_activation(activation)))


def test_layers_without_experts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "mixtral", [3, 5, 12], E, I, H)
    for number in (0, 1, 35, -1):
        with pytest.raises(
            ValueError, match=f"layer {number} has no experts; layers with experts: 3, 5, 12"
        ) as raised:
            load_experts(tmp_path, number)
        assert str(tmp_path) in str(raised.value)


def test_a_checkpoint_without_experts(tmp_path: Path) -> None:
    tensors = {f"model.layers.0.mlp.{name}_proj.weight": zeros(4, 4) for name in ("gate", "up", "down")}
    tensors |= {"model.layers.0.mlp.shared_experts.down_proj.weight": zeros(4, 4)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="layer 0 has no experts; layers with experts: none"):
        load_experts(tmp_path, 0)


def test_experts_in_an_unknown_form(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.0.gate_proj.qweight"
    write_safetensors(tmp_path / "model.safetensors", {name: zeros(4, dtype=np.int32)})
    message = (
        r"layer 0 has experts, but under no known tensor names, "
        r"e\.g\. '.*\.experts\.\{e\}\.gate_proj\.qweight'"
    )
    with pytest.raises(ValueError, match=message):
        load_experts(tmp_path, 0)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory"):
        load_experts(tmp_path / "nowhere", 0)
    write_checkpoint(tmp_path, "qwen3_moe", [0, 1], E, I, H, num_shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors"):
        load_experts(tmp_path, 1)
