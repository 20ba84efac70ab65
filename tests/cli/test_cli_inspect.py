"""`ktmoe inspect`: what it prints of every kind of checkpoint, as JSON and as text, and its errors."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint, write_safetensors
from cli_runs import CONTROL, QUICK, only_error, run_ktmoe
from converted import said
from inspected import write_gguf, write_mixed, write_native

import ktmoe_np.cli.inspect
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.cli import machine, main

pytestmark = pytest.mark.usefixtures("leave_no_engine")

#: What two layers of `write_checkpoint` with E 6, I 32, H 64 and P 2 have.
LAYER_BYTES = 3 * 2 * 6 * 32 * 64


def report_of(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json", *more]) == 0
    value: dict[str, Any] = json.loads(said(capsys))
    return value


def text_of(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["inspect", str(path), "--no-measure"]) == 0
    return said(capsys)


def has(monkeypatch: pytest.MonkeyPatch, **sizes: int | None) -> None:
    """Let the machine have so much memory."""
    memory = {"total_bytes": None, "available_bytes": None, "limit_bytes": None, **sizes}
    monkeypatch.setattr(ktmoe_np.cli.inspect, "memory_sizes", lambda: memory)


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [1, 2], E=6, I=32, H=64, num_shards=2)
    report = report_of(tmp_path, capsys, *QUICK)
    layer = {
        "layer": 1,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "activation": "silu",
        "formats": {"gate_proj": "bf16", "up_proj": "bf16", "down_proj": "bf16"},
        "method": "BF16",
        "problem": None,
        "group_size": None,
        "int8_projections": [],
        "activation_dtype": "bfloat16",
        "model_activation_dtype": "bfloat16",
        "num_bytes": LAYER_BYTES,
        "token_bytes": LAYER_BYTES // 3,
    }
    assert report["layers"] == [layer, {**layer, "layer": 2}]
    assert (report["path"], report["kind"]) == (str(tmp_path), "safetensors")
    assert (report["model_type"], report["architecture"]) == ("qwen3_moe", None)
    assert (report["num_layers"], report["further_layers"]) == (3, [])
    assert (report["num_bytes"], report["token_bytes"]) == (2 * LAYER_BYTES, 2 * LAYER_BYTES // 3)
    assert report["memory"]["total_bytes"] > 0
    assert report["fits_in_memory"] is True
    limits = report["limits"]
    assert limits["isa"] == ext.isa_info()["active"]
    assert report["tokens_per_s"] == limits["read_bytes_per_s"] / report["token_bytes"]


def test_json_of_every_kind(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native = tmp_path / "native"
    native.mkdir()
    num_bytes = write_native(native, "mxfp8")
    report = report_of(native, capsys, "--no-measure")
    assert (report["limits"], report["tokens_per_s"], report["num_bytes"]) == (None, None, num_bytes)
    report = report_of(target, capsys, "--no-measure")
    assert report["kind"] == "converted"
    assert {(layer["method"], layer["group_size"]) for layer in report["layers"]} == {("AMXINT4", 32)}
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "model.gguf")
    report = report_of(tmp_path / "model.gguf", capsys, "--no-measure")
    assert [layer["layer"] for layer in report["layers"]] == [1, 2]
    assert report["layers"][0]["formats"] == {"gate_proj": "q4_0", "up_proj": "q4_0", "down_proj": "bf16"}


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0, 1, 2], E=6, I=32, H=64)
    has(monkeypatch, total_bytes=2 * 10**9)
    assert text_of(tmp_path, capsys).splitlines() == [
        str(tmp_path),
        "qwen3_moe, safetensors of Hugging Face",
        "",
        "Layers            3, all with experts",
        "Experts           6, 2 per token",
        "Sizes             hidden 64, intermediate 32",
        "Activation        silu",
        "Format            bf16",
        "Method            BF16",
        "Activation dtype  bfloat16",
        "Bytes             73.7 kB per layer; 221 kB in all",
        "Read per token    24.6 kB per layer; 73.7 kB in all",
        "Memory            all experts fit in the 2 GB that this machine has",
    ]


def test_text_with_the_speed_that_memory_allows(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], E=6, I=32, H=64)
    done = run_ktmoe("inspect", tmp_path, "--threads=1", *QUICK, KTMOE_ISA="scalar")
    assert (done.returncode, done.stderr) == (0, "")
    assert CONTROL.search(done.stdout) is None
    assert max(map(len, done.stdout.splitlines())) <= 100
    text = " ".join(done.stdout.split())
    assert "GB/s, measured now on 1 thread, allows " in text
    assert " tokens/s: the experts alone, one token at a time." in text


def test_text_of_layers_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mixed(tmp_path)
    has(monkeypatch, total_bytes=10**9, limit_bytes=600_000)
    text = text_of(tmp_path, capsys)
    assert max(map(len, text.splitlines())) <= 98
    said = " ".join(text.split())
    for part in (
        "Qwen3MoeForCausalLM (qwen3_moe), safetensors of Hugging Face",
        "Layers 7, of which 1-2,5 with experts",
        "Format bf16 (layers 1-2); fp8 (layer 5)",
        "Method BF16 (layers 1-2); FP8 (layer 5)",
        "Bytes 276 kB per layer (layers 1-2); 138 kB per layer (layer 5); 691 kB in all",
        "Not counted 276 kB of experts behind the model's last layer (layer 8)",
        "Memory the experts do not fit in the 600 kB that this process may use: the rest is read from the",
    ):
        assert part in said
    monkeypatch.setattr(
        ktmoe_np.cli.inspect, "measure_limits", lambda *_: {"read_bytes_per_s": 1e9, "threads": 2}
    )
    assert main(["inspect", str(tmp_path)]) == 0
    assert (
        "allows 2170 tokens/s: the experts alone, one token at a time, if they did fit in memory."
        in " ".join(capsys.readouterr().out.split())
    )


def test_text_of_converted_layers_and_unknown_memory(
    target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((target / "config.json").read_text())
    for name in ("model_type", "num_hidden_layers"):
        del config[name]
    (target / "config.json").write_text(json.dumps(config))
    has(monkeypatch)
    text = text_of(target, capsys)
    assert "unknown model, files of ktmoe convert\n" in text
    assert "\nLayers            0-2 with experts\n" in text
    assert "\nFormat            int4_group32\nMethod            AMXINT4, groups of 32\n" in text
    assert "\nActivation dtype  int8\n" in text
    assert text.endswith("\nMemory            unknown\n")
    assert report_of(target, capsys, "--no-measure")["fits_in_memory"] is None


def test_text_of_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "model.gguf")
    text = text_of(tmp_path, capsys)
    assert "qwen3moe, GGUF\n" in text
    assert "\nFormat            q4_0 of gate and up, bf16 of down\nMethod            LLAMAFILE\n" in text
    dtypes = "bfloat16 (default of a layer) or int8 in gate and up (default of generate and eval)"
    assert f"Activation dtype {dtypes}" in " ".join(text.split())
    (layer, _) = report_of(tmp_path, capsys, "--no-measure")["layers"]
    assert layer["int8_projections"] == ["gate_proj", "up_proj"]
    assert (layer["activation_dtype"], layer["model_activation_dtype"]) == ("bfloat16", "int8")


@pytest.mark.parametrize("encoding", ["rawint4", "mxfp8", "gptq"])
def test_text_of_activation_dtypes(encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_native(tmp_path, encoding)
    said = "bfloat16" if encoding == "mxfp8" else "bfloat16 (default) or int8"
    assert f"\nActivation dtype  {said}\n" in text_of(tmp_path, capsys)


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, damaged, bare = (tmp_path / name for name in ("dense", "damaged", "bare"))
    for path in (dense, damaged, bare):
        path.mkdir()
    write_safetensors(dense / "model.safetensors", {"model.norm.weight": np.zeros(2)})
    (dense / "config.json").write_text("{}")
    for path in (damaged, bare):
        write_native(path, "fp8")
    (bare / "config.json").unlink()
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for path, message in [
        (tmp_path / "nowhere", "nowhere: no such file or directory"),
        (tmp_path, "no *.safetensors file"),
        (bare, "config.json: no such file or directory"),
        (dense, "no layer has experts: a dense model"),
        (damaged, "the file is cut off, or its header lies"),
    ]:
        assert main(["inspect", str(path), "--no-measure"]) == 2
        line = only_error(capsys)
        assert line.startswith("ktmoe inspect: ")
        assert message in line
    assert main(["inspect"]) == 2
    assert "the following arguments are required: path" in only_error(capsys)


def test_limits_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least limit of the process's control group and of those around it counts, if there is less."""
    files = {"/proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 10 kB\n"}
    monkeypatch.setattr(machine, "read_system", lambda path: files.get(str(path), ""))
    for more, limit in [
        ({}, None),
        ({"/sys/fs/cgroup/memory.max": "2048000\n"}, None),
        ({"/sys/fs/cgroup/memory.max": "4096\n"}, 4096),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/memory.max": "3072\n"}, 3072),
        ({"/sys/fs/cgroup/a/b/memory.max": "max\n"}, 3072),
        ({"/proc/self/cgroup": "0::/\n5:memory,cpu:/c\n"}, 4096),
        ({"/sys/fs/cgroup/memory/c/memory.limit_in_bytes": "2048\n"}, 2048),
        ({"/proc/self/cgroup": "5:cpu:/c\nnonsense\n"}, 4096),
    ]:
        files |= more
        sizes = {"total_bytes": 1024000, "available_bytes": 10240, "limit_bytes": limit}
        assert machine.memory_sizes() == sizes


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.cli.inspect).failed == 0
