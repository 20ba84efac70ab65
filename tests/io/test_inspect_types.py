"""`inspect_checkpoint` of tensors in types that nothing reads: the other layers are as ever."""

from __future__ import annotations

import doctest
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import draw_experts, layer_tensors, write_safetensors
from inspected import E, H, I, put_config, write_gguf
from native_checkpoints import LAYER, draw_layer

import ktmoe_np.io.gguf.experts
from ktmoe_np import KTMoEWrapper
from ktmoe_np.cli import main
from ktmoe_np.io.inspect import inspect_checkpoint

pytestmark = pytest.mark.usefixtures("leave_no_engine")


def plain_model(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Two layers in bfloat16, changed."""
    tensors: dict[str, Any] = {}
    for number in (0, 1):
        drawn = layer_tensors("qwen3_moe", draw_experts("qwen3_moe", (E, I, H), np.random.default_rng(0)))
        tensors |= {f"model.layers.{number}.{name}": array for name, array in drawn.items()}
    change(tensors)
    write_safetensors(path / "model.safetensors", tensors)
    put_config(path)


@pytest.mark.parametrize("dtype", [np.float64, np.int16, ml_dtypes.float8_e5m2])
def test_a_layer_of_another_dtype_is_reported(tmp_path: Path, dtype: Any) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if ".layers.1." in name and "gate_proj" in name:
                tensors[name] = tensors[name].astype(dtype)

    plain_model(tmp_path, change)
    first, second = inspect_checkpoint(tmp_path).layers
    assert (first.method, first.problem, first.formats["gate_proj"]) == ("BF16", None, "bf16")
    names = {"float64": "f64", "int16": "i16", "float8_e5m2": "f8_e5m2"}
    assert second.formats == {
        "gate_proj": names[np.dtype(dtype).name],
        "up_proj": "bf16",
        "down_proj": "bf16",
    }
    assert (second.method, second.group_size, second.int8_projections) == (None, None, ())
    assert (second.activation_dtype, second.model_activation_dtype) == (None, None)
    assert second.problem is not None
    assert "model.safetensors: tensor 'model.layers.1.mlp.experts.0." in second.problem
    assert second.num_bytes == E * I * H * (np.dtype(dtype).itemsize + 4)
    with pytest.raises(ValueError, match=re.escape(second.problem)):
        KTMoEWrapper.from_pretrained(tmp_path, 1)
    KTMoEWrapper.from_pretrained(tmp_path, 0)


def test_a_dtype_that_numpy_does_not_have_is_reported(tmp_path: Path) -> None:
    plain_model(tmp_path, lambda tensors: None)
    path = tmp_path / "model.safetensors"
    # A type of a later version of the format, of as many letters.
    path.write_bytes(path.read_bytes().replace(b'{"dtype": "BF16"', b'{"dtype": "F4_9"'))
    for layer in inspect_checkpoint(tmp_path).layers:
        assert set(layer.formats.values()) == {"f4_9"}
        assert layer.method is None
        assert "got F4_9" in str(layer.problem)


def test_experts_of_several_dtypes_are_reported(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    plain_model(tmp_path, lambda tensors: tensors.update({name: tensors[name].astype(np.float32)}))
    first, second = inspect_checkpoint(tmp_path).layers
    assert first.formats["down_proj"] == "bf16 f32"
    assert str(first.problem).endswith(f"tensor '{name}': got F32 [{H}, {I}], expected BF16 [{H}, {I}]")
    assert second.method == "BF16"


def test_scales_of_another_dtype_are_reported(tmp_path: Path) -> None:
    layer = draw_layer("fp8", E, I, H)
    name = f"model.layers.{LAYER}.mlp.experts.1.up_proj.weight_scale_inv"
    layer.tensors[name] = layer.tensors[name].astype(np.float16)
    write_safetensors(tmp_path / "model.safetensors", layer.tensors)
    put_config(tmp_path)
    (found,) = inspect_checkpoint(tmp_path).layers
    assert set(found.formats.values()) == {"f8_e4m3"}
    assert f"tensor '{name}': got F16" in str(found.problem)


def test_codes_of_another_dtype_are_reported(tmp_path: Path) -> None:
    layer = draw_layer("rawint4", E, I, H)
    tensors = {
        name: array.astype(np.int64) if name.endswith(".weight_packed") else array
        for name, array in layer.tensors.items()
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    put_config(tmp_path)
    (found,) = inspect_checkpoint(tmp_path).layers
    assert set(found.formats.values()) == {"i64"}
    assert "got I64" in str(found.problem)


def test_a_gguf_type_of_a_later_version_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write_gguf(path, num_layers=3)
    data = path.read_bytes()
    name = b"blk.1.ffn_up_exps.weight"
    at = data.index(name) + len(name) + 4 + 3 * 8
    path.write_bytes(data[:at] + (99).to_bytes(4, "little") + data[at + 4 :])
    first, second = inspect_checkpoint(path).layers
    assert first.formats == {"gate_proj": "q4_0", "up_proj": "type 99", "down_proj": "bf16"}
    assert (first.method, second.method) == (None, "LLAMAFILE")
    assert "tensor 'blk.1.ffn_up_exps.weight': got type 99, expected one of" in str(first.problem)


def test_the_command_says_why_there_is_no_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float64)

    plain_model(tmp_path, change)
    assert main(["inspect", str(tmp_path), "--no-measure"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Format f64 Method none Activation dtype none" in text
    assert "Refused " in text
    assert "gate_proj.weight': got F64" in text
    assert "; and 1 layer more" in text
    assert main(["inspect", str(tmp_path), "--no-measure", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["method"] for layer in layers] == [None, None]
    assert all("got F64" in layer["problem"] for layer in layers)


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.io.gguf.experts).failed == 0
