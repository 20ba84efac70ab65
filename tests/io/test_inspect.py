"""`inspect_checkpoint`: every kind of checkpoint, numbers computed by hand, headers alone, and its errors."""

from __future__ import annotations

import doctest
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import NAMINGS, write_checkpoint, write_safetensors
from converted import name_of, run, said
from inspected import E, H, I, put_config, write_gguf, write_mixed, write_native
from native_checkpoints import ENCODINGS, LAYER, draw_layer

import ktmoe_np.config.hf
import ktmoe_np.io.inspect
from ktmoe_np import KTMoEWrapper
from ktmoe_np.io import SafetensorsCheckpoint, SafetensorsFile
from ktmoe_np.io.inspect import inspect_checkpoint

pytestmark = pytest.mark.usefixtures("leave_no_engine")


@pytest.fixture
def headers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of a safetensors file can be looked at."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsFile, "tensor", refuse)
    monkeypatch.setattr(SafetensorsCheckpoint, "tensor", refuse)


def test_doctests() -> None:
    for module in (ktmoe_np.io.inspect, ktmoe_np.config.hf):
        assert doctest.testmod(module).failed == 0


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("naming", NAMINGS)
def test_plain_checkpoints(tmp_path: Path, naming: str) -> None:
    write_checkpoint(tmp_path, naming, [2, 5], E=6, I=32, H=64, num_shards=2)
    report = inspect_checkpoint(tmp_path)
    assert (report.kind, report.model_type, report.architecture) == ("safetensors", naming, None)
    assert (report.path, report.num_layers, report.further_layers) == (tmp_path, 6, ())
    assert [layer.config.layer_idx for layer in report.layers] == [2, 5]
    names = ["gate_proj", "up_proj", "down_proj"]
    if naming == "nemotron_h":
        del names[1]
    num_bytes = len(names) * 2 * 6 * 32 * 64 + (2 * 6 * (32 + 32 + 64) if naming == "gpt_oss" else 0)
    for layer in report.layers:
        assert layer.formats == dict.fromkeys(names, "bf16")
        assert (layer.method, layer.group_size) == ("BF16", None)
        assert (layer.num_bytes, layer.token_bytes) == (num_bytes, num_bytes * 2 // 6)
    assert (report.num_bytes, report.token_bytes) == (2 * num_bytes, 2 * (num_bytes * 2 // 6))


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_native_checkpoints(tmp_path: Path, encoding: str) -> None:
    num_bytes = write_native(tmp_path, encoding)
    report = inspect_checkpoint(tmp_path)
    assert (report.kind, report.num_layers) == ("safetensors", LAYER + 2)
    (layer,) = report.layers
    method = ENCODINGS[encoding][0]
    assert (layer.method, set(layer.formats.values())) == (method, {method.lower()})
    assert (layer.num_bytes, layer.token_bytes) == (num_bytes, num_bytes * 2 // 3)


def test_bytes_by_hand(tmp_path: Path) -> None:
    write_native(tmp_path, "fp8")
    (layer,) = inspect_checkpoint(tmp_path).layers
    expert = 3 * 96 * 160 + 4 * (1 * 2 + 1 * 2 + 2 * 1)  # a float32 for 128 x 128 codes
    assert (layer.num_bytes, layer.token_bytes) == (3 * expert, 2 * expert)


@pytest.mark.parametrize("encoding", ["fp8", "rawint4", "gpt_oss"])
def test_the_method_is_that_of_from_pretrained(tmp_path: Path, encoding: str) -> None:
    write_native(tmp_path, encoding)
    (layer,) = inspect_checkpoint(tmp_path).layers
    assert layer.method == KTMoEWrapper.from_pretrained(tmp_path, LAYER).method


def test_layers_that_differ_and_layers_behind_the_last(tmp_path: Path) -> None:
    write_mixed(tmp_path)
    report = inspect_checkpoint(tmp_path)
    assert report.architecture == "Qwen3MoeForCausalLM"
    assert [layer.config.layer_idx for layer in report.layers] == [1, 2, 5]
    assert [layer.method for layer in report.layers] == ["BF16", "BF16", "FP8"]
    assert [layer.formats["up_proj"] for layer in report.layers] == ["bf16", "bf16", "fp8"]
    assert [layer.config.layer_idx for layer in report.further_layers] == [8]
    plain, fp8 = 3 * 2 * 3 * 96 * 160, 3 * (3 * 96 * 160 + 24)
    assert report.num_bytes == 2 * plain + fp8
    assert report.token_bytes == (2 * plain + fp8) * 2 // 3
    put_config(tmp_path)
    report = inspect_checkpoint(tmp_path)
    assert (report.num_layers, len(report.layers), report.further_layers) == (None, 4, ())


def test_one_file_is_a_checkpoint(tmp_path: Path) -> None:
    num_bytes = write_native(tmp_path, "mxfp4_packed")
    assert inspect_checkpoint(tmp_path / "model.safetensors").num_bytes == num_bytes


@pytest.mark.parametrize(
    ("options", "fmt", "group_size", "num_bytes"),
    [
        (["AMXINT4"], "int4_group32", 32, 2 * 6 * 32 * (32 + 2 + 4) + 6 * 64 * (16 + 1 + 4)),
        (["AMXINT8"], "int8", None, 2 * 6 * 32 * (64 + 4) + 6 * 64 * (32 + 4)),
        (["MOE_INT8", "32"], "int8_group32", 32, 2 * 6 * 32 * (64 + 8) + 6 * 64 * (32 + 4)),
    ],
)
def test_converted_directories(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    fmt: str,
    group_size: int | None,
    num_bytes: int,
) -> None:
    method, *size = options
    more = ["--layers=1-2", *(f"--group-size={number}" for number in size)]
    assert run(source, tmp_path / "out", *more, method=method) == 0
    said(capsys)
    assert KTMoEWrapper.from_pretrained(tmp_path / "out", 1).method == method
    monkeypatch.delattr(SafetensorsFile, "tensor")
    report = inspect_checkpoint(tmp_path / "out")
    assert (report.kind, report.model_type, report.num_layers) == ("converted", "qwen3_moe", 3)
    assert [layer.config.layer_idx for layer in report.layers] == [1, 2]
    for layer in report.layers:
        assert (layer.method, layer.group_size) == (method, group_size)
        assert layer.formats == dict.fromkeys(("gate_proj", "up_proj", "down_proj"), fmt)
        assert (layer.num_bytes, layer.token_bytes) == (num_bytes, num_bytes * 2 // 6)


@pytest.mark.parametrize("further", [0, 1])
def test_gguf_models(tmp_path: Path, further: int) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "model.gguf", further=further)
    num_bytes = 2 * 4 * 32 * (64 // 32 * 18) + 2 * 4 * 64 * 32
    for path in (tmp_path, tmp_path / "model.gguf"):
        report = inspect_checkpoint(path)
        assert (report.kind, report.model_type, report.num_layers) == ("gguf", "qwen3moe", 3 - further)
        assert [layer.config.layer_idx for layer in report.layers] == [1, 2][: 2 - further]
        assert [layer.config.layer_idx for layer in report.further_layers] == [2][:further]
        layer = report.layers[0]
        assert (layer.config.num_experts, layer.config.hidden_size, layer.method) == (4, 64, "LLAMAFILE")
        assert layer.formats == {"gate_proj": "q4_0", "up_proj": "q4_0", "down_proj": "bf16"}
        assert (layer.num_bytes, layer.token_bytes) == (num_bytes, num_bytes // 2)


# ---- errors ----


def message_of(path: Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        inspect_checkpoint(path)
    return str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    assert message_of(tmp_path / "nowhere", FileNotFoundError).endswith("nowhere: no such file or directory")
    assert "no *.safetensors file" in message_of(tmp_path, FileNotFoundError)
    write_native(tmp_path, "fp8")
    (tmp_path / "config.json").unlink()
    assert "config.json" in message_of(tmp_path, FileNotFoundError)


def test_dense_models_and_strange_names(tmp_path: Path) -> None:
    for name, message in [
        ("mlp.down_proj.weight", "no layer has experts: a dense model (model_type 'llama')"),
        (
            "moe.experts.0.wide.weight",
            "has experts, but under no known tensor names, e.g. 'model.layers.0.moe.exp",
        ),
    ]:
        write_safetensors(tmp_path / "model.safetensors", {f"model.layers.0.{name}": np.zeros((2, 2))})
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
        assert f"{tmp_path}: {message}" in message_of(tmp_path)


@pytest.mark.parametrize("encoding", [None, "fp8", "rawint4"])
def test_damage_is_named(tmp_path: Path, encoding: str | None) -> None:
    if encoding is None:
        write_checkpoint(tmp_path, "qwen3_moe", [0], E, I, H)
    else:
        write_native(tmp_path, encoding)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert message_of(tmp_path).endswith("the file is cut off, or its header lies")
    file.write_bytes(whole)
    put_config(tmp_path, hidden_size=2 * H)
    assert "expected" in message_of(tmp_path)
    assert str(file) in message_of(tmp_path)
    put_config(tmp_path, num_experts=E - 1)
    assert f": got one, expected {E - 1} experts" in message_of(tmp_path)
    put_config(tmp_path, hidden_act="relu2")
    assert "have a gate, but activation relu2 is not gated" in message_of(tmp_path)


def test_a_missing_shard_and_a_missing_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0, 1], E, I, H, num_shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in message_of(tmp_path, FileNotFoundError)
    layer = draw_layer("fp8", E, I, H)
    gone = f"model.layers.{LAYER}.mlp.experts.1.up_proj.weight_scale_inv"
    del layer.tensors[gone]
    write_safetensors(tmp_path / "model.safetensors", layer.tensors)
    put_config(tmp_path)
    assert f"tensor '{gone}': got none, expected F32 or BF16" in message_of(tmp_path)


def test_files_of_quantized_layers_without_a_manifest(target: Path) -> None:
    (target / "ktmoe.json").unlink()
    assert "holds files of quantized layers, but no ktmoe.json" in message_of(target)


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda value: value.update(method="BF16"),
            "method: got 'BF16', expected one that quantizes weights",
        ),
        (lambda value: value.update(method="INT3"), "method: got 'INT3' for mode 'inference'"),
        (lambda value: value.update(group_size=48), "group_size: got 48, expected None, 32, 64 or 128"),
        (
            lambda value: value.update(method="AMXINT8", group_size=None),
            "format: got 'int4_group32'",
        ),
        (lambda value: value.update(source=3), "source: got 3, expected a string"),
    ],
)
def test_manifests_of_something_else(target: Path, change: Change, message: str) -> None:
    value = json.loads((target / "ktmoe.json").read_text())
    change(value)
    (target / "ktmoe.json").write_text(json.dumps(value))
    assert message in message_of(target)


def test_converted_layers_that_are_missing(target: Path) -> None:
    (target / name_of(1)).unlink()
    assert "layer-00001.safetensors: no such file; layers that are there: 0, 2" in message_of(
        target, FileNotFoundError
    )
    for number in (0, 2):
        (target / name_of(number)).unlink()
    assert "none of the layers of ktmoe.json is there" in message_of(target, FileNotFoundError)
    value = json.loads((target / "ktmoe.json").read_text())
    (target / "ktmoe.json").write_text(json.dumps({**value, "layers": {}}))
    assert message_of(target) == f"{target}: no layer is converted yet"


def test_a_damaged_converted_layer(target: Path) -> None:
    file = target / name_of(1)
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file}: tensor" in message_of(target)


def test_gguf_errors(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write_gguf(path, num_layers=1)
    assert message_of(path) == f"{path}: no layer has experts: a dense model (architecture 'qwen3moe')"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-200])
    assert str(path) in message_of(path)
