"""What is wrong with the experts of a GGUF model is said by file, tensor, what was found and expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("gguf")

from gguf_checkpoints import LAYER, config_of, draw_layer, raw, raw_key, write

from ktmoe_np.formats.gguf import GGUF_FORMATS
from ktmoe_np.io.gguf.experts import gguf_config, load_gguf

Tensors = dict[str, tuple[str, NDArray[Any]]]
Change = Callable[[Tensors], object]

E, I, H = 3, 32, 64  # noqa: E741

STEM = f"blk.{LAYER}.ffn_"
U32 = pack("<I", 1)


def put(name: str, kind: str, *shape: int) -> Change:
    """Put a tensor with rows of so many bytes."""
    return lambda tensors: tensors.update({name: (kind, np.zeros(shape, np.uint8))})


def drop(pattern: str) -> Change:
    """Take away every tensor whose name has the pattern."""
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if re.search(pattern, name)]


UP, DOWN = f"{STEM}up_exps.weight", f"{STEM}down_exps.weight"

WRONG_TENSORS: list[tuple[str, Change, str]] = [
    ("stacked", drop("up_exps.weight"), r"up_exps\.weight': got none, expected \[3, 32, 64\]"),
    ("stacked", drop("down_exps.weight"), r"down_exps\.weight': got none, expected \[3, 64, 32\]"),
    ("stacked", drop("gate_exps.bias"), r"gate_exps\.bias': got none, expected \[3, 32\]"),
    ("fused", drop("down_exps.weight"), r"down_exps\.weight': got none, expected \[3, 64, 32\]"),
    ("fused", drop("down_exps.bias"), r"down_exps\.bias': got none, expected \[3, 64\]"),
    ("single", drop("up.1"), r"up\.1\.weight': got none, expected \[32, 64\]"),
    (
        "stacked",
        put(UP, "q8_0", E, H, 34),
        r"up_exps\.weight': got shape \[3, 64, 32\], expected \[3, 32, 64\]",
    ),
    ("stacked", put(UP, "q8_0", I, 68), r"up_exps\.weight': got shape \[32, 64\], expected \[3, 32, 64\]"),
    (
        "fused",
        put(DOWN, "q8_0", 2, H, 34),
        r"down_exps\.weight': got shape \[2, 64, 32\], expected \[3, 64, 32",
    ),
    (
        "single",
        put(f"{STEM}up.1.weight", "q8_0", H, 34),
        r"up\.1\.weight': got shape \[64, 32\], expected \[32,",
    ),
    (
        "stacked",
        put(f"{STEM}up_exps.bias", "f32", E, 8),
        r"up_exps\.bias': got shape \[3, 2\], expected \[3, 32",
    ),
    (
        "stacked",
        put(UP, "q8_1", E, I, 80),
        rf"up_exps\.weight': got q8_1, expected one of {', '.join(GGUF_FORMATS)}$",
    ),
    (
        "stacked",
        put(f"{STEM}up_exps.bias", "q8_0", E, 34),
        r"up_exps\.bias': got q8_0, expected one of f32, f16, bf16$",
    ),
    (
        "single",
        put(f"{STEM}up.2.weight", "f16", I, 2 * H),
        r"up\.2\.weight': got f16, expected q8_0, as in 'blk\.5\.ffn_up\.0\.weight'",
    ),
    ("single", put(f"{STEM}up.7.weight", "q8_0", I, 68), r"up\.7\.weight': got one, expected 3 experts"),
    (
        "stacked",
        put(f"{STEM}up_exps.scale", "f32", 4 * E),
        r"up_exps\.scale': got a scale per expert beside q8_0 blocks, expected none$",
    ),
    (
        "fused",
        put(f"{STEM}gate_up_exps.scale", "f32", 4 * E),
        r"gate_up_exps\.scale': got a scale per expert beside q8_0 blocks, expected none$",
    ),
]


@pytest.mark.parametrize(("naming", "change", "message"), WRONG_TENSORS)
def test_wrong_tensors(tmp_path: Path, naming: str, change: Change, message: str) -> None:
    layer = draw_layer("q8_0", E, I, H, naming, bias=None if naming == "single" else "f32")
    change(layer.tensors)
    write(tmp_path / "model.gguf", layer.tensors)
    with pytest.raises(ValueError, match=message) as raised:
        load_gguf(tmp_path, LAYER, config_of(E, I, H))
    assert str(raised.value).startswith(f"{tmp_path}")
    assert f"tensor '{STEM}" in str(raised.value)


@pytest.mark.parametrize("role", ["gate", "up", "down"])
def test_global_scales_of_nvfp4(tmp_path: Path, role: str) -> None:
    layer = draw_layer("nvfp4", E, 64, H)
    activations = {f"{STEM}{name}_exps.input_scale": 4 * E for name in ("gate", "up", "down")}
    for name, size in activations.items():
        put(name, "f32", size)(layer.tensors)
    write(tmp_path / "model.gguf", layer.tensors)
    load_gguf(tmp_path, LAYER, config_of(E, 64, H))
    put(f"{STEM}{role}_exps.scale", "f32", 4 * E)(layer.tensors)
    write(tmp_path / "model.gguf", layer.tensors)
    message = (
        rf"tensor '{STEM}{role}_exps\.scale': got a scale per expert beside nvfp4 blocks, expected none; "
        "load the safetensors checkpoint with method NVFP4 instead$"
    )
    with pytest.raises(ValueError, match=message):
        load_gguf(tmp_path, LAYER, config_of(E, 64, H))


@pytest.mark.parametrize(
    ("naming", "sizes", "message"),
    [
        ("stacked", (E - 1, I, H), r"gate_exps\.weight': got shape \[3, 32, 64\], expected \[2, 32, 64\]"),
        ("stacked", (E + 1, I, H), r"gate_exps\.weight': got shape \[3, 32, 64\], expected \[4, 32, 64\]"),
        ("fused", (E, 2 * I, H), r"gate_up_exps\.weight': got shape \[3, 64, 64\], expected \[3, 128, 64\]"),
        ("stacked", (E, I, 2 * H), r"gate_exps\.weight': got shape \[3, 32, 64\], expected \[3, 32, 128\]"),
        ("single", (E - 1, I, H), r"gate\.2\.weight': got one, expected 2 experts"),
        ("single", (E + 1, I, H), r"gate\.3\.weight': got none, expected \[32, 64\]"),
    ],
)
def test_other_sizes_than_the_config(
    tmp_path: Path, naming: str, sizes: tuple[int, int, int], message: str
) -> None:
    write(tmp_path / "model.gguf", draw_layer("q8_0", E, I, H, naming).tensors)
    with pytest.raises(ValueError, match=message):
        load_gguf(tmp_path, LAYER, config_of(*sizes))


def test_gates(tmp_path: Path) -> None:
    for naming, gate, activation in (("ungated", "no", "silu is"), ("stacked", "a", "relu2 is not")):
        write(tmp_path / "model.gguf", draw_layer("q8_0", E, I, H, naming).tensors)
        message = (
            rf"{tmp_path}: the experts under 'blk\.5\.ffn_' have {gate} gate, but activation {activation}"
        )
        with pytest.raises(ValueError, match=message):
            load_gguf(tmp_path, LAYER, config_of(E, I, H, activation.split()[0]))


def test_layers_without_experts(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", draw_layer("q8_0", E, I, H).tensors)
    with pytest.raises(ValueError, match=rf"{tmp_path}: layer 4 has no experts; layers with experts: 5"):
        load_gguf(tmp_path, 4, config_of(E, I, H))
    write(tmp_path / "model.gguf", {})
    with pytest.raises(ValueError, match="layer -1 has no experts; layers with experts: none"):
        load_gguf(tmp_path, -1, config_of(E, I, H))


WRONG_METADATA: list[tuple[dict[str, Any], str]] = [
    ({"expert_count": None}, "metadata 'x.expert_count': got none, expected a whole number"),
    ({"expert_used_count": None}, "metadata 'x.expert_used_count': got none, expected a whole number"),
    ({"embedding_length": None}, "metadata 'x.embedding_length': got none, expected a whole number"),
    (
        {"feed_forward_length": None},
        "metadata 'x.expert_feed_forward_length' or 'x.feed_forward_length': got none, expected",
    ),
    ({"expert_count": 0}, "'x.expert_count': got 0 for layer 1, expected a whole number of at least 1"),
    ({"expert_count": "many"}, "'x.expert_count': got 'many' for layer 1, expected a whole number"),
    ({"expert_count": True}, "'x.expert_count': got True for layer 1, expected a whole number"),
    ({"embedding_length": 64.0}, "'x.embedding_length': got 64.0 for layer 1, expected a whole number"),
    ({"feed_forward_length": [32, 0]}, "'x.feed_forward_length': got 0 for layer 1, expected a whole number"),
    (
        {"feed_forward_length": [32]},
        "'x.feed_forward_length': got values for 1 layers, expected one for layer 1",
    ),
    ({"swiglu_clamp_exp": "high"}, "metadata 'x.swiglu_clamp_exp': got 'high', expected a number"),
    ({"swiglu_clamp_exp": [7.0]}, "'x.swiglu_clamp_exp': got values for 1 layers, expected one for layer 1"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_METADATA)
def test_wrong_metadata(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    values = {"expert_count": 8, "expert_used_count": 2, "embedding_length": 64, "feed_forward_length": 32}
    metadata = {f"x.{name}": value for name, value in {**values, **changes}.items() if value is not None}
    write(tmp_path / "model.gguf", {}, metadata, architecture="x")
    with pytest.raises(ValueError, match=message) as raised:
        gguf_config(tmp_path, 1)
    assert str(raised.value).startswith(f"{tmp_path}: metadata 'x.")


def test_architectures(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for keys, got in (
        ([], "none"),
        ([raw_key(b"general.architecture", 4, U32)], "1"),
    ):
        path.write_bytes(raw(keys))
        message = rf"{path}: metadata 'general\.architecture': got {got}, expected a string"
        with pytest.raises(ValueError, match=message):
            gguf_config(path, 0)
