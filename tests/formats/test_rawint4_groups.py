"""compressed-tensors packs int4 in groups of 32, 64 or 128: the group size is part of the encoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import AnyArray, Batch, Layer, assert_close, assert_same_bits, bf16, draw_batch

from ktmoe_np import KTMoEWrapper
from ktmoe_np.io.inspect import inspect_checkpoint
from ktmoe_np.io.safetensors.writer import write_safetensors
from ktmoe_np.reference import decode_rawint4

pytestmark = [pytest.mark.kernels, pytest.mark.asan]

E, P, LAYER = 3, 2, 5

groups = pytest.mark.parametrize("group_size", [32, 64, 128])


def draw_arguments(inter: int, hidden: int, group_size: int) -> dict[str, AnyArray]:
    """Codes and scales of a layer."""
    rng = np.random.default_rng(group_size)
    arguments: dict[str, AnyArray] = {}
    for name, (n, k) in {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}.items():
        arguments[f"{name}_proj"] = rng.integers(0, 256, (E, n, -(-k // 2)), np.uint8)
        scale = rng.uniform(0.2, 1, (E, n, -(-k // group_size))) * k**-0.5 / 3
        arguments[f"{name}_scale"] = scale.astype(bf16)
    return arguments


def decoded(arguments: dict[str, AnyArray], group_size: int) -> Layer:
    """The layer that they stand for."""
    _, inter, _ = arguments["gate_proj"].shape
    _, hidden, _ = arguments["down_proj"].shape
    columns = {"gate": hidden, "up": hidden, "down": inter}
    return Layer(
        **{
            f"{name}_proj": decode_rawint4(
                arguments[f"{name}_proj"], arguments[f"{name}_scale"], k, group_size=group_size
            )
            for name, k in columns.items()
        }
    )


def batch_of(hidden: int) -> Batch:
    layer = Layer(*(np.zeros((E, *shape), bf16) for shape in ((1, hidden), (1, hidden), (hidden, 1))))
    return draw_batch(np.random.default_rng(1), layer, 7, P)


def write_checkpoint(path: Path, arguments: dict[str, AnyArray]) -> None:
    tensors: dict[str, AnyArray] = {}
    for name in ("gate", "up", "down"):
        codes, scale = arguments[f"{name}_proj"], arguments[f"{name}_scale"]
        for e in range(E):
            stem = f"model.layers.{LAYER}.mlp.experts.{e}.{name}_proj.weight"
            tensors[f"{stem}_packed"] = np.ascontiguousarray(codes[e]).view(np.int32)
            tensors[f"{stem}_scale"] = scale[e]
            tensors[f"{stem}_shape"] = np.array([codes.shape[1], 2 * codes.shape[2]])
    write_safetensors(path / "model.safetensors", tensors)
    hidden, inter = arguments["down_proj"].shape[1], arguments["gate_proj"].shape[1]
    config = {"num_experts": E, "num_experts_per_tok": P, "hidden_size": hidden}
    config |= {"model_type": "qwen3_moe", "moe_intermediate_size": inter}
    (path / "config.json").write_text(json.dumps(config))


@groups
@pytest.mark.parametrize(("inter", "hidden"), [(256, 128), (40, 200), (129, 65)])
def test_arrays_in_groups_are_what_the_reference_decodes(inter: int, hidden: int, group_size: int) -> None:
    arguments = draw_arguments(inter, hidden, group_size)
    moe = KTMoEWrapper(0, E, P, hidden, inter, method="RAWINT4", group_size=group_size)
    moe.load_weights_from_tensors(**arguments)
    batch = batch_of(hidden)
    assert_close(moe.forward(*batch), decoded(arguments, group_size), batch)


@groups
@pytest.mark.parametrize("mode", ["inference", "sft"])
@pytest.mark.parametrize("is_named", [False, True])
def test_a_checkpoint_tells_its_groups(tmp_path: Path, mode: Any, is_named: bool, group_size: int) -> None:
    arguments = draw_arguments(128, 256, group_size)
    write_checkpoint(tmp_path, arguments)
    method = "RAWINT4" + ("_SFT" if mode == "sft" else "")
    made: Any = KTMoEWrapper.from_pretrained(tmp_path, LAYER, method if is_named else None, mode=mode)
    assert (made.method, made.group_size) == (method, group_size)
    given = KTMoEWrapper(0, E, P, 256, 128, mode=mode, method=method, group_size=group_size)
    given.load_weights_from_tensors(**arguments)
    batch = batch_of(256)
    assert_same_bits(made.forward(*batch), given.forward(*batch))
    report = inspect_checkpoint(tmp_path).layers[0]
    assert (report.method, report.group_size) == ("RAWINT4", group_size)


def test_other_groups_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, draw_arguments(128, 256, 64))
    message = (
        "layer 5: got RAWINT4 in groups of 64, expected groups of 128: make the layer with group_size=64"
    )
    with pytest.raises(ValueError, match=message):
        KTMoEWrapper.from_pretrained(tmp_path, LAYER, group_size=128)


def test_a_group_size_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size: got 48, expected None, 32, 64 or 128"):
        KTMoEWrapper(0, E, P, 64, 32, method="RAWINT4", group_size=48)


@groups
def test_scales_of_other_groups_are_refused(group_size: int) -> None:
    arguments = draw_arguments(256, 256, 64 if group_size == 32 else 32)
    moe = KTMoEWrapper(0, E, P, 256, 256, method="RAWINT4", group_size=group_size)
    with pytest.raises(
        ValueError, match=rf"gate_scale: got .*, expected bfloat16 \[3, 256, {256 // group_size}\]"
    ):
        moe.load_weights_from_tensors(**arguments)
