"""`ktmoe convert`: files, tables, resuming, damage, errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from cli_runs import CONTROL, environment, only_error, shown_on_terminal
from converted import E, H, I, corrupt, name_of, names_in, run, said
from quantized_rows import quantized_bytes

from ktmoe_np import KTMoEWrapper
from ktmoe_np.cli import convert, main
from ktmoe_np.cli.quantized_reference import dequantize_rows
from ktmoe_np.formats.quantized import FORMATS
from ktmoe_np.io import SafetensorsFile
from ktmoe_np.io.safetensors.writer import replacing, write_safetensors

pytestmark = pytest.mark.usefixtures("leave_no_engine")


# ---- converting ----


@pytest.mark.parametrize(
    ("method", "size", "fmt"),
    [
        ("AMXINT8", None, "int8"),
        ("AMXINT4", 128, "int4_group128"),
        ("MOE_INT8", 32, "int8_group32"),
        ("MOE_INT4", None, "int4_group32"),
    ],
)
def test_convert(
    method: str, size: int | None, fmt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, target = tmp_path / "model", tmp_path / "to" / "quantized"
    drawn = write_checkpoint(model, "qwen3_moe", [1, 4], E=E, I=I, H=H)
    group = [] if size is None else [f"--group-size={size}"]
    assert run(model, target, "--json", *group, method=method) == 0
    report = json.loads(said(capsys))
    assert names_in(target) == ["config.json", "ktmoe.json", name_of(1), name_of(4), "model.safetensors"]
    assert (target / "config.json").read_bytes() == (model / "config.json").read_bytes()
    manifest = json.loads((target / "ktmoe.json").read_text())
    assert manifest["method"] == report["method"] == method
    assert manifest["group_size"] == report["group_size"] == FORMATS[fmt].group_size
    assert manifest["source"] == str(model.resolve())
    assert [(row["layer"], row["status"]) for row in report["layers"]] == [(1, "written"), (4, "written")]
    for row in report["layers"]:
        file = SafetensorsFile(target / name_of(row["layer"]))
        sample = row["experts_checked"]
        assert sample == [0, 2, 3, 5]
        for name in ("gate_proj", "up_proj", "down_proj"):
            weights = drawn[row["layer"]][name]
            assert weights is not None
            codes, scale = quantized_bytes(fmt, weights)
            assert np.array_equal(file.tensor(f"{name}.codes"), codes)
            decoded = dequantize_rows(FORMATS[fmt], codes, scale, weights.shape[-1])[sample]
            exact = weights[sample].astype(np.float64)
            error = np.linalg.norm(decoded - exact) / np.linalg.norm(exact)
            assert row["relative_error"][name] == pytest.approx(error, rel=1e-9)
        recorded = manifest["layers"][str(row["layer"])]
        assert recorded["relative_error"] == row["relative_error"]
        assert recorded["experts_checked"] == sample


def test_what_was_converted_loads(target: Path, source: Path, tmp_path: Path) -> None:
    moe = KTMoEWrapper.from_pretrained(target, 1)
    assert (moe.method, moe.group_size, moe.loaded) == ("AMXINT4", 32, True)
    saved = moe.save_weights(tmp_path / "again")  # type: ignore[attr-defined]
    assert saved.read_bytes() == (target / name_of(1)).read_bytes()
    fresh = KTMoEWrapper.from_pretrained(source, 1, method="AMXINT4")
    saved = fresh.save_weights(tmp_path / "fresh")  # type: ignore[attr-defined]
    assert saved.read_bytes() == (target / name_of(1)).read_bytes()
    assert KTMoEWrapper.from_pretrained(target, 1, method="MOE_INT4").loaded


def test_group_sizes_come_from_the_directory(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "64", "--group-size=64", "--layers=0") == 0
    assert KTMoEWrapper.from_pretrained(tmp_path / "64").group_size == 64
    assert KTMoEWrapper.from_pretrained(tmp_path / "64", method="MOE_INT4").group_size == 64
    with pytest.raises(ValueError, match=r"gate_proj\.format: got 'int4_group64', expected 'int4_group32'"):
        KTMoEWrapper.from_pretrained(tmp_path / "64", group_size=32)
    with pytest.raises(ValueError, match=r"gate_proj\.format: got 'int4_group64', expected 'int8'"):
        KTMoEWrapper.from_pretrained(tmp_path / "64", method="MOE_INT8")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_to_the_config_of_the_source(link: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "int4"
    write_checkpoint(source, "qwen3_moe", [0], E, I, H)
    target.mkdir()
    link(source / "config.json", target / "config.json")
    before = (source / "config.json").stat()
    assert run(source, target) == 0
    after = (source / "config.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_convert_text(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "int4"
    assert run(source, target, "--layers", "0-1") == 0
    out = said(capsys)
    assert CONTROL.search(out) is None
    assert max(map(len, out.splitlines())) <= 100 + len(str(tmp_path))
    assert out.startswith(f"{source} with method AMXINT4 in groups of 32\n")
    assert re.search(r"^ +0  +\S+  +0\.0\d{4}  +0\.0\d{4}  +0\.0\d{4}  written$", out, re.MULTILINE)
    text = " ".join(out.split())
    assert "over a sample of 4 experts in each layer" in text
    assert "Every file was read back and compared." in text
    assert "2 layers in" in text
    assert "The directory runs once the other layers are converted too." in text
    assert "bits per weight; 0 of them were there already." in text


def test_experts_without_gate_and_with_biases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for naming, tensors in (("nemotron_h", 4), ("gpt_oss", 9)):
        model, target = tmp_path / naming, tmp_path / f"{naming}-int8"
        write_checkpoint(model, naming, [0], E=E, I=I, H=H)
        assert run(model, target, method="AMXINT8") == 0
        assert len(SafetensorsFile(target / name_of(0)).names()) == tensors
        assert main(["verify", str(target)]) == 0
        assert KTMoEWrapper.from_pretrained(target).loaded
        said(capsys)


# ---- going on ----


def test_whole_layers_are_kept(target: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_ino for path in target.glob("*.safetensors")}
    content = (target / name_of(1)).read_bytes()
    (target / name_of(1)).write_bytes(content[:-1])
    (target / name_of(2)).unlink()
    (target / ".ktmoe-0123.part").write_bytes(b"of a process that was killed")
    with replacing(target / "x") as other:  # of a process that runs
        running = Path(other.name).name
        assert run(source, target, "--json") == 0
        parts = [name for name in names_in(target) if name.endswith(".part")]
    report = json.loads(said(capsys))
    assert [row["status"] for row in report["layers"]] == ["kept", "written", "written"]
    assert (target / name_of(1)).read_bytes() == content
    assert (target / name_of(0)).stat().st_ino == before[name_of(0)]
    assert parts == [running]


@pytest.mark.parametrize("damage", ["a byte", "no record", "another source"])
def test_layers_that_are_not_right_are_converted_again(
    damage: str, target: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (target / name_of(1)).read_bytes()
    if damage == "a byte":  # a code as good as another
        corrupt(target / name_of(1), "up_proj.codes", (5, 3, 2), 0x11)
    elif damage == "no record":
        manifest = json.loads((target / "ktmoe.json").read_text())
        del manifest["layers"]["1"]
        (target / "ktmoe.json").write_text(json.dumps(manifest))
    else:
        write_checkpoint(source, "qwen3_moe", [0, 1, 2], E=E, I=I, H=H, num_shards=2, seed=1)
    assert run(source, target, "--json") == 0
    status = [row["status"] for row in json.loads(said(capsys))["layers"]]
    if damage == "another source":
        assert status == ["written"] * 3
        assert (target / name_of(1)).read_bytes() != content
    else:
        assert status == ["kept", "written", "kept"]
        assert (target / name_of(1)).read_bytes() == content


def test_layers_come_one_range_after_the_other(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "int4"
    for layers, expected in (("2", [2]), ("0-1", [0, 1]), ("0,1-2", [0, 1, 2])):
        assert run(source, target, "--json", "--layers", layers) == 0
        assert [row["layer"] for row in json.loads(said(capsys))["layers"]] == expected
    assert sorted(json.loads((target / "ktmoe.json").read_text())["layers"]) == ["0", "1", "2"]


def test_what_another_process_records_stays(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, right = tmp_path / "int4", convert.save_quantized

    def meanwhile(*arguments: Any) -> Path:
        monkeypatch.setattr(convert, "save_quantized", right)
        assert run(source, target, "--layers=2") == 0
        return right(*arguments)

    monkeypatch.setattr(convert, "save_quantized", meanwhile)
    assert run(source, target, "--layers=0-1") == 0
    said(capsys)
    assert main(["verify", str(target)]) == 0


_CHILD = """
import sys, time
from ktmoe_np import kt_kernel_ext as ext
right = ext.quantize_task
def slow(*a, **k):
    print("begun", flush=True)
    time.sleep(0.02)
    return right(*a, **k)
ext.quantize_task = slow
from ktmoe_np.cli import main
sys.exit(main(sys.argv[1:]))
"""


def child_command(source: Path, target: Path) -> list[str]:
    """A slow conversion in a process of its own."""
    return [sys.executable, "-c", _CHILD, "convert", str(source), str(target), "--method=AMXINT4"]


def child_environment() -> dict[str, str]:
    here = environment()
    return {
        **here,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "support"), here["PYTHONPATH"]]),
    }


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_interrupts_leave_whole_layers_only(
    how: signal.Signals, status: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "int4"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        child_command(source, target), env=child_environment(), stdout=pipe, stderr=pipe, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        while not (target / name_of(0)).exists():
            assert child.poll() is None
            time.sleep(0.001)
        child.send_signal(how)
        errors = child.communicate()[1]
    assert child.returncode == status, errors
    assert errors == ("ktmoe: interrupted\n" if how == signal.SIGINT else "")
    assert not (target / name_of(2)).exists()
    if how == signal.SIGINT:
        assert not list(target.glob("*.part"))
    assert run(source, target, "--json") == 0
    said(capsys)
    layers = map(name_of, range(3))
    assert names_in(target) == ["config.json", "ktmoe.json", *layers, "model.safetensors"]
    assert main(["verify", str(target)]) == 0


def test_terminal_shows_progress(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    for shows in ("layer 2: down_proj", "layer 2: there already"):
        raw = shown_on_terminal(
            child_command(source, tmp_path / "int4"), child_environment(), stdout=subprocess.DEVNULL
        )
        assert shows.encode() in raw
        num_steps = 3 * (3 * E + 1) + 1
        assert f"{num_steps}/{num_steps} [".encode() in raw


def test_what_reads_otherwise_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = convert.save_quantized

    def forgetful(*arguments: Any) -> Path:
        path = right(*arguments)
        corrupt(path, "down_proj.codes", (0, 0, 0), 0x11)
        return path

    monkeypatch.setattr(convert, "save_quantized", forgetful)
    assert run(source, tmp_path / "int4") == 2
    assert "'down_proj.codes' does not match what was written" in only_error(capsys)
    assert json.loads((tmp_path / "int4" / "ktmoe.json").read_text())["layers"] == {}


def test_biases_that_read_otherwise_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "model", "gpt_oss", [0], E=E, I=I, H=H)
    right = convert.save_quantized

    def forgetful(*arguments: Any) -> Path:
        path = right(*arguments)
        corrupt(path, "up_proj.bias", (0, 0), 0x11)
        return path

    monkeypatch.setattr(convert, "save_quantized", forgetful)
    assert run(tmp_path / "model", tmp_path / "int4") == 2
    assert "'up_proj.bias' does not match what was written" in only_error(capsys)


# ---- errors ----


def test_convert_errors(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    write_safetensors(bare / "model.safetensors", {"norm": np.ones(4, np.float32)})
    (tmp_path / "file").write_bytes(b"")
    for arguments, message in [
        ([tmp_path / "nowhere", tmp_path / "x"], "no such file or directory"),
        ([bare, tmp_path / "x"], "no layer has experts under known tensor names"),
        ([source, tmp_path / "x", "--layers=1-3"], "layer 3 has no experts; layers with experts: 0, 1, 2"),
        ([source, source], "got the source, expected a directory of its own"),
        ([source, tmp_path / "file"], "got a file, expected a directory"),
        ([source, tmp_path / "x", "--method=BF16"], "method: got 'BF16', expected one of AMXINT8, AMXINT4, "),
        ([source, tmp_path / "x", "--method=INT4"], "method: got 'INT4' for mode 'inference'"),
        (
            [source, tmp_path / "x", "--group-size=48"],
            "group_size: got 48, expected None, 32, 64 or 128 with",
        ),
        ([source, tmp_path / "x", "--layers=3-1"], "got '3-1', expected an ascending range"),
        (
            [source, tmp_path / "x", "--layers=0-9999999"],
            "expected an ascending range of numbers below 100000",
        ),
        ([source, tmp_path / "x", "--layers=a"], "got 'a', expected an integer of 0 or more"),
    ]:
        assert main(["convert", "--method=AMXINT4", *map(str, arguments)]) == 2
        line = only_error(capsys)
        assert line.startswith("ktmoe convert: ")
        assert message in line
    assert not (tmp_path / "x").exists()


def test_other_conversions_are_left_alone(
    target: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "other", "qwen3_moe", [0], E=E, I=I, H=H)
    for arguments, message in [
        ((tmp_path / "other", target), f"source: got '{source}', expected '{tmp_path / 'other'}'"),
        ((source, target, "--group-size=64"), "group_size: got 32, expected 64: another conversion is there"),
        ((source, target, "--method=MOE_INT4"), "method: got 'AMXINT4', expected 'MOE_INT4'"),
    ]:
        assert run(*arguments) == 2  # type: ignore[arg-type]
        assert message in only_error(capsys)


def test_weights_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", "qwen3_moe", [0, 1], E=E, I=I, H=H)
    file = tmp_path / "model" / "model.safetensors"
    for byte in (126, 127):  # the second row is NaN from here on
        corrupt_bf16(file, "model.layers.1.mlp.experts.3.up_proj.weight", 17, byte)
    assert run(tmp_path / "model", tmp_path / "int4") == 2
    assert "layer 1: up_proj: expert 3, row 17: got nan, expected finite weights" in only_error(capsys)
    assert names_in(tmp_path / "int4") == ["config.json", "ktmoe.json", name_of(0)]


def corrupt_bf16(path: Path, tensor: str, row: int, at: int) -> None:
    info = SafetensorsFile(path).info(tensor)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little") + info.begin
    data[start + row * 2 * info.shape[1] + at] = 0xFF
    path.write_bytes(data)
