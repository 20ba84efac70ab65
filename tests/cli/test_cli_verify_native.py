"""`ktmoe verify` of checkpoints in encodings of their own, and of GGUF models."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint
from cli_runs import QUICK, only_error, run_ktmoe
from inspected import E, H, I, put_config, write_mixed
from native_checkpoints import ENCODINGS, LAYER, draw_layer, put_layer

from ktmoe_np import KTMoEWrapper
from ktmoe_np.cli import expert_source, main, measure
from ktmoe_np.cli.expert_source import open_layer
from ktmoe_np.formats.encodings import NATIVE_FORMATS
from ktmoe_np.inference import BaseMoEWrapper
from ktmoe_np.reference import decode_gguf
from ktmoe_np.reference.integer_encodings import INTEGERS

pytestmark = pytest.mark.usefixtures("leave_no_engine")

P = 2

#: Types of gate and up, and of down.
GGUF_TYPES = [("q4_k", "q6_k"), ("q8_0", "bf16"), ("q3_k", "q5_0"), ("f32", "q2_k")]


def write_native(path: Path, encoding: str, *, naming: str = "qwen", biases: bool = False) -> None:
    """A model of one layer, all of whose weights are numbers of a size that bounds can be computed for."""
    layer = draw_layer(encoding, E, I, H, naming, biases=biases)
    for name, array in layer.tensors.items():
        if array.dtype == ml_dtypes.float8_e4m3fn:
            codes = array.view(np.uint8)
            codes[codes & 127 == 127] &= 0x83
        elif "scale" in name.rpartition(".")[2] and array.dtype.itemsize == 1:
            scale = array.view(np.uint8)
            scale[...] = 118 + scale % 4
    put_layer(path, layer)
    more = {"mlp_hidden_act": "relu2", "model_type": "nemotron_h"} if naming == "nemotron" else {}
    put_config(path, num_hidden_layers=LAYER + 2, **more)


def write_model(
    path: Path, gate_up: str, down: str, naming: str = "stacked", *, split: int = 0, bias: str | None = None
) -> Any:
    """A GGUF model of one layer with experts."""
    pytest.importorskip("gguf")
    from gguf_checkpoints import draw_layer, write

    layer = draw_layer({"gate": gate_up, "up": gate_up, "down": down}, E, 256, 512, naming, bias=bias)
    sizes = {"expert_count": E, "expert_used_count": P, "embedding_length": 512}
    sizes["expert_feed_forward_length"] = 256
    metadata = {f"qwen3moe.{key}": value for key, value in sizes.items()}
    write(path / "model.gguf", layer.tensors, metadata, split=split)
    return layer


def write_mxfp8(path: Path) -> None:
    write_native(path, "mxfp8")


def write_gguf(path: Path) -> None:
    write_model(path, "q4_k", "q6_k")


def verified(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str, status: int = 0) -> Any:
    """What ``verify --json`` says."""
    options = ["--json", "--tokens=1,20", "--check-seconds=60", *QUICK]
    assert main(["verify", str(path), *options, *arguments]) == status
    return json.loads(capsys.readouterr().out)


def assert_right(report: dict[str, Any], method: str, weight_bytes: int, largest_bound: float = 0.2) -> None:
    assert report["within_bound"]
    assert (report["method"], report["layer"], report["weight_bytes"]) == (method, LAYER, weight_bytes)
    assert report["checked_experts"] == report["num_experts"] == E
    for row, num_experts in zip(report["rows"], (P, E), strict=True):
        assert 0 <= row["error"] <= row["bound"] < largest_bound  # a bound that says something
        assert row["gb_per_s"] * row["ms"] == pytest.approx(weight_bytes / E * num_experts / 1e6)
        assert row["of_limit"] > 0


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_verify_native_checkpoints(encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_native(tmp_path, encoding)
    method = ENCODINGS[encoding][0]
    fmt = NATIVE_FORMATS[method.lower()]
    weight_bytes = E * (2 * fmt.matrix_bytes(I, H) + fmt.matrix_bytes(H, I))
    assert_right(verified(capsys, tmp_path), method, weight_bytes)


@pytest.mark.parametrize("encoding", ["fp8", "fp8_channel", "gptq", "gpt_oss"])
def test_verify_native_checkpoints_by_the_name_of_their_method(
    encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_native(tmp_path, encoding)
    method = ENCODINGS[encoding][0]
    report = verified(capsys, tmp_path, f"--method={method}", "--tokens=3", f"--layer={LAYER}")
    assert (report["within_bound"], report["method"]) == (True, method)
    assert {row["tokens"] for row in report["rows"]} == {3}


def test_verify_native_experts_without_a_gate_and_with_biases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in (("ungated", {"naming": "nemotron"}), ("biased", {"biases": True})):
        (tmp_path / name).mkdir()
        write_native(tmp_path / name, "nvfp4_modelopt", **options)
        report = verified(capsys, tmp_path / name)
        assert (report["within_bound"], report["method"]) == (True, "NVFP4")
        assert report["activation"] == ("relu2" if name == "ungated" else "silu")


@pytest.mark.parametrize(("gate_up", "down"), GGUF_TYPES)
def test_verify_gguf_models(
    gate_up: str, down: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = write_model(tmp_path, gate_up, down)
    weight_bytes = sum(array.nbytes for array in layer.matrices.values())
    assert_right(verified(capsys, tmp_path), "LLAMAFILE", weight_bytes)
    file = next(tmp_path.glob("*.gguf"))
    assert_right(verified(capsys, file, "--method=LLAMAFILE", f"--layer={LAYER}"), "LLAMAFILE", weight_bytes)


def test_verify_gguf_models_of_other_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for naming, split, bias in (("fused", 1, "f32"), ("single", 3, None)):
        (tmp_path / naming).mkdir()
        layer = write_model(tmp_path / naming, "q5_k", "q4_0", naming, split=split, bias=bias)
        weight_bytes = sum(array.nbytes for array in layer.matrices.values())
        assert_right(verified(capsys, tmp_path / naming), "LLAMAFILE", weight_bytes)


@pytest.mark.parametrize("encoding", [name for name, (method, *_) in ENCODINGS.items() if method in INTEGERS])
def test_verify_native_checkpoints_in_int8(
    encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_native(tmp_path, encoding)
    fmt = NATIVE_FORMATS[ENCODINGS[encoding][0].lower()]
    report = verified(capsys, tmp_path, "--activation-dtype=int8")
    assert_right(report, ENCODINGS[encoding][0], E * (2 * fmt.matrix_bytes(I, H) + fmt.matrix_bytes(H, I)))
    assert report["activation_dtype"] == "int8"


@pytest.mark.kernels
@pytest.mark.parametrize(("gate_up", "down"), GGUF_TYPES)
def test_verify_gguf_models_in_int8(
    gate_up: str, down: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = write_model(tmp_path, gate_up, down)
    report = verified(capsys, tmp_path, "--activation-dtype=int8")
    weight_bytes = sum(array.nbytes for array in layer.matrices.values())
    assert_right(report, "LLAMAFILE", weight_bytes, 0.3)  # codes of the intermediate may differ by one
    assert report["activation_dtype"] == "int8"


@pytest.mark.kernels
@pytest.mark.parametrize("write", [partial(write_native, encoding="rawint4"), write_gguf])
def test_verify_tells_int8_activations_from_bf16(
    write: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path)
    right = BaseMoEWrapper.forward
    monkeypatch.setattr(
        BaseMoEWrapper,
        "forward",
        lambda self, x, ids, w: right(self, x, ids, w, activation_dtype="bfloat16"),
    )
    assert not verified(capsys, tmp_path, "--activation-dtype=int8", status=1)["within_bound"]
    assert verified(capsys, tmp_path, "--activation-dtype=bfloat16")["within_bound"]


def test_verify_text_of_a_native_checkpoint(tmp_path: Path) -> None:
    write_native(tmp_path, "rawint4")
    done = run_ktmoe("verify", tmp_path, "--tokens=2", "--threads=1", *QUICK)
    assert (done.returncode, done.stderr) == (0, "")
    said = " ".join(done.stdout.split())
    assert "Method RAWINT4 with bfloat16 activations, 1 thread; results of 3 experts compared" in said
    assert "Every result is within its bound" in said


def test_verify_layers_of_more_than_one_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mixed(tmp_path)
    found = [verified(capsys, tmp_path, *more) for more in ([], ["--layer=2"], ["--method=AMXINT8"])]
    assert [(report["layer"], report["method"]) for report in found] == [
        (1, "BF16"),
        (2, "BF16"),
        (1, "AMXINT8"),
    ]
    # The codes of this layer are any, NaN among them: the method is what matters.
    config, _ = open_layer(tmp_path, 5, None)
    assert KTMoEWrapper.from_pretrained(tmp_path, config.layer_idx).method == "FP8"


@pytest.mark.parametrize("write", [write_mxfp8, write_gguf])
def test_verify_finds_wrong_results(
    write: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path)
    right = BaseMoEWrapper.forward
    monkeypatch.setattr(
        BaseMoEWrapper, "forward", lambda self, x, ids, w: right(self, x, ids, w * np.float32(1.1))
    )
    report = verified(capsys, tmp_path, status=1)
    assert not report["within_bound"]
    assert all("outside the bound" in row["problem"] for row in report["rows"])


@pytest.mark.parametrize("encoding", ["fp8", "fp8_channel", "mxfp8", "rawint4", "gptq", "mxfp4_u8"])
def test_verify_finds_a_few_wrong_weights(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_native(tmp_path, encoding)
    method = ENCODINGS[encoding][0]
    right = expert_source.DECODERS[method]

    def decode(codes: Any, scale: Any, factors: Any, group_size: int) -> Any:
        flipped = codes.copy()
        flipped.view(np.uint8)[:, 0, :8] ^= 0x80  # a sign, or of codes of four bits half of their range
        return right(flipped, scale, factors, group_size)

    monkeypatch.setitem(expert_source.DECODERS, method, decode)
    assert not verified(capsys, tmp_path, status=1)["within_bound"]


def test_the_reference_decodes_the_experts_of_the_sample_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path)
    decoded = []

    def decode(data: Any, type_name: str) -> Any:
        decoded.append(len(data))
        return decode_gguf(data, type_name)

    monkeypatch.setattr(expert_source, "decode_gguf", decode)
    assert verified(capsys, tmp_path, "--check-seconds=1e-9")["checked_experts"] == 1
    assert set(decoded) == {1}


def test_native_layers_are_measured_in_child_processes(tmp_path: Path) -> None:
    write_native(tmp_path, "mxfp4_packed")
    run = measure.measure_in_child("scalar", tmp_path, [LAYER], [1, 3], 0.0, E, 1)
    assert (run.isa, run.threads, sorted(run.results)) == ("scalar", 1, [1, 3])


def test_verify_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {name: tmp_path / name for name in ("int4", "fp8", "plain", "gguf")}
    for path in paths.values():
        path.mkdir()
    write_native(paths["int4"], "rawint4")
    write_native(paths["fp8"], "fp8")
    write_checkpoint(paths["plain"], "qwen3_moe", [1], E=4, I=32, H=64)
    write_gguf(paths["gguf"])
    model = paths["gguf"] / "model.gguf"
    other = "has no experts under known tensor names; layers with experts: 5"
    for path, arguments, message in [
        (paths["int4"], ["--method=MXFP4"], "the experts of layer 5: got RAWINT4, expected MXFP4"),
        (
            paths["int4"],
            ["--method=AMXINT4"],
            "the experts of layer 5: got RAWINT4, expected bfloat16 with method 'AMXINT4'",
        ),
        (paths["fp8"], ["--method=BF16"], "of layer 5: got FP8, expected bfloat16 with method 'BF16'"),
        (paths["fp8"], ["--method=LLAMAFILE"], f"got 'LLAMAFILE', which reads GGUF: {paths['fp8']} is none"),
        (paths["fp8"], ["--layer=6"], f"layer 6 {other}"),
        (paths["plain"], ["--method=FP8"], "got BF16, expected weights of FP8"),
        (paths["gguf"], ["--method=FP8"], f"got 'FP8', expected 'LLAMAFILE': {paths['gguf']} is GGUF"),
        (model, ["--method=BF16"], f"got 'BF16', expected 'LLAMAFILE': {model} is GGUF"),
        (model, ["--method=FP5"], "method: got 'FP5'"),
        (model, ["--layer=0"], f"layer 0 {other}"),
        (tmp_path / "nowhere.gguf", [], "no such file or directory"),
        (paths["fp8"], ["--activation-dtype=int8"], "activation_dtype: got int8, expected bfloat16: fp8"),
        (
            paths["plain"],
            ["--activation-dtype=bfloat16", "--method=AMXINT8"],
            "expected int8: the method multiplies int8 activations; MOE_INT8 and MOE_INT4 take the same",
        ),
        (paths["plain"], ["--activation-dtype=int4"], "got 'int4', expected auto, bfloat16 or int8"),
    ]:
        assert main(["verify", str(path), *arguments]) == 2
        line = only_error(capsys)
        assert line.startswith("ktmoe verify: ")
        assert message in line
