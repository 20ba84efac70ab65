"""`ktmoe verify`: checkpoints of others, sampled checks, and its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from cli_runs import CONTROL, QUICK, only_error, run_ktmoe

from ktmoe_np.cli import main
from ktmoe_np.cli.checkpoint import write_demo_checkpoint
from ktmoe_np.cli.expert_source import TensorSource
from ktmoe_np.cli.quantized_reference import quantize_matrices
from ktmoe_np.cli.sample import Expected, draw_sample
from ktmoe_np.config import MoEConfig
from ktmoe_np.formats.methods import find_method
from ktmoe_np.formats.quantized import FORMATS
from ktmoe_np.inference import BaseMoEWrapper
from ktmoe_np.io import load_experts, load_hf_config
from ktmoe_np.io.safetensors.writer import write_safetensors
from ktmoe_np.reference import moe_forward

pytestmark = pytest.mark.usefixtures("leave_no_engine")


@pytest.mark.parametrize("naming", ["qwen3_moe", "gpt_oss", "nemotron_h", "llama4"])
def test_verify_checkpoints_of_others(
    naming: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, naming, [2, 5], E=6, I=32, H=64, num_shards=2)
    arguments = ["verify", str(tmp_path), "--tokens", "1,3,40", "--check-seconds", "1", *QUICK]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["within_bound"]
    assert (report["layer"], report["num_experts"], report["hidden_size"]) == (2, 6, 64)
    assert report["weight_bytes"] == 2 * 6 * 32 * 64 * (2 if naming == "nemotron_h" else 3)
    assert [row["tokens"] for row in report["rows"]] == [1, 3, 40]
    assert all(row["of_limit"] > 0 for row in report["rows"])


def test_verify_text(tmp_path: Path) -> None:
    write_demo_checkpoint(tmp_path)
    done = run_ktmoe("verify", tmp_path, "--layer=1", "--tokens=2", "--threads=1", *QUICK, KTMOE_ISA="scalar")
    assert (done.returncode, done.stderr) == (0, "")
    assert CONTROL.search(done.stdout) is None
    assert done.stdout.startswith(f"Layer 1 of {tmp_path}\n16 experts, 4 per token, hidden size 1024,")
    assert re.search(r"^scalar +2 .* yes ", done.stdout, re.MULTILINE)
    said = " ".join(done.stdout.split())
    assert "Method BF16 with bfloat16 activations, 1 thread; results of" in said
    assert "Every result is within its bound; scalar runs 2 tokens at" in said


def test_verify_checks_fewer_experts_in_less_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], E=6, I=32, H=64, num_experts_per_tok=4)
    checked = []
    for seconds in ("1e-9", "60"):
        assert (
            main(["verify", str(tmp_path), "--json", "--tokens=9", f"--check-seconds={seconds}", *QUICK]) == 0
        )
        checked.append(json.loads(capsys.readouterr().out)["checked_experts"])
    assert checked == [1, 6]


@pytest.mark.kernels
def test_verify_finds_wrong_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], E=4, I=32, H=64)
    right = BaseMoEWrapper.forward
    monkeypatch.setattr(
        BaseMoEWrapper, "forward", lambda self, x, ids, w: right(self, x, ids, w * np.float32(1.1))
    )
    assert main(["verify", str(tmp_path), "--tokens=2", *QUICK]) == 1
    assert "WRONG on" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["AMXINT8", "AMXINT4", "MOE_INT8", "MOE_INT4"])
@pytest.mark.parametrize("num_experts", [1, 5])
def test_the_reference_judges_quantized_layers(name: str, num_experts: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gpt_oss", [0], E=6, I=32, H=64, num_experts_per_tok=3)
    config = MoEConfig.from_hf_config(load_hf_config(tmp_path), 0)
    experts, sample = load_experts(tmp_path, 0, config), draw_sample(config, num_experts)
    method = find_method(name, "inference")
    fmt = FORMATS[method.formats[method.resolve_group_size(None)]]
    codes = (np.stack(projection.codes) for projection in experts.projections.values())
    matrices = [quantize_matrices(fmt, matrix) for matrix in codes]
    biases = experts.bias_arguments()
    inputs = (sample.hidden_states, sample.ids, sample.weights, *matrices)
    right = moe_forward(*inputs, **biases, activation=config.activation, product=method.product)
    expected = Expected(sample, config, TensorSource(experts, fmt, method.product))
    assert expected.num_experts == num_experts
    assert expected.judge(right).problem is None
    unquantized = Expected(sample, config, TensorSource(experts))
    assert unquantized.num_experts == num_experts
    assert unquantized.judge(right).problem is not None


@pytest.mark.parametrize("name", ["AMXINT8", "AMXINT4", "MOE_INT8", "MOE_INT4"])
def test_verify_quantized_layers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], E=4, I=32, H=64)
    assert main(["verify", str(tmp_path), "--json", "--tokens=1,40", f"--method={name}", *QUICK]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == name


def test_verify_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    write_checkpoint(model, "qwen3_moe", [1], E=4, I=32, H=64)
    bare = tmp_path / "bare"
    bare.mkdir()
    write_safetensors(bare / "model.safetensors", {"norm": np.ones(4, np.float32)})
    for arguments, message in [
        ([str(tmp_path / "nowhere")], "no such file or directory"),
        ([str(tmp_path)], "no *.safetensors file"),
        ([str(bare)], "no layer has experts"),
        ([str(bare), "--layer=0"], "config.json: no such file or directory"),
        (
            [str(model), "--layer=7"],
            "layer 7 has no experts under known tensor names; layers with experts: 1",
        ),
        ([str(model), "--method=FP5"], "method: got 'FP5'"),
    ]:
        assert main(["verify", *arguments]) == 2
        line = only_error(capsys)
        assert line.startswith("ktmoe verify: ")
        assert message in line


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["AMXINT8", "AMXINT4", "MOE_INT8", "MOE_INT4"])
def test_verify_quantized_layers_in_int8(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", [0], E=4, I=32, H=160)
    arguments = ["verify", str(tmp_path), "--json", "--tokens=1,40", "--activation-dtype=int8", *QUICK]
    assert main([*arguments, f"--method={name}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["within_bound"], report["method"], report["activation_dtype"]) == (True, name, "int8")
