"""`ktmoe verify` of what `ktmoe convert` has written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from cli_runs import only_error
from converted import E, H, I, corrupt, name_of, said

from ktmoe_np.cli import main

pytestmark = pytest.mark.usefixtures("leave_no_engine")


def test_verify_measures_against_the_source(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(target), "--json"]) == 0
    report = json.loads(said(capsys))
    manifest = json.loads((target / "ktmoe.json").read_text())
    assert report["whole"]
    assert report["source_problem"] is None
    for row in report["layers"]:
        assert row["status"] == "whole"
        assert row["relative_error"] == manifest["layers"][str(row["layer"])]["relative_error"]
    assert main(["verify", str(target), "--layer=1"]) == 0
    text = " ".join(said(capsys).split())
    assert "1 layer, every file whole: header, shapes, scales, codes and SHA-256." in text


def test_verify_without_the_source(target: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source.rename(source.with_name("elsewhere"))
    assert main(["verify", str(target)]) == 0
    text = " ".join(said(capsys).split())
    assert f"Errors are those recorded, as the source cannot be read: {source}: no such file" in text


def test_verify_finds_damage(target: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = target / name_of(1)
    whole = file.read_bytes()
    num_pairs = H // 2
    for damage, status, message in [
        (("gate_proj.codes", (3, 17, num_pairs), 0), "DAMAGED", "expert 3, row 17: got multiplier 0, exp"),
        (("gate_proj.codes", (3, 17, num_pairs), 16), "DAMAGED", "got multiplier 16, expected -15 to 15"),
        (("gate_proj.codes", (3, 17, 0), 0x11), "CHANGED", "which was recorded: its bytes have changed"),
    ]:
        file.write_bytes(whole)
        corrupt(file, *damage)
        assert main(["verify", str(target)]) == 1
        out = said(capsys)
        assert f"  {status}\n" in out
        text = " ".join(out.split())
        assert f"WRONG: {file}" in text
        assert message in text
    file.write_bytes(whole[:-1])
    assert main(["verify", str(target)]) == 1
    assert "the file is cut off" in " ".join(said(capsys).split())
    file.unlink()
    assert main(["verify", str(target)]) == 1
    assert f"WRONG: {file}: no such file" in " ".join(said(capsys).split())


def test_verify_finds_what_is_not_recorded(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((target / "ktmoe.json").read_text())
    del manifest["layers"]["1"]
    (target / "ktmoe.json").write_text(json.dumps(manifest))
    assert main(["verify", str(target)]) == 1
    assert "is not in ktmoe.json; convert the layer again" in " ".join(said(capsys).split())
    manifest["layers"] = {}
    (target / "ktmoe.json").write_text(json.dumps(manifest))
    for layer in range(3):
        (target / name_of(layer)).unlink()
    assert main(["verify", str(target)]) == 1
    assert "no layer is there" in " ".join(said(capsys).split())


def test_verify_finds_another_source(target: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(source, "qwen3_moe", [0, 1, 2], E=E, I=I, H=H, num_shards=2, seed=1)
    assert main(["verify", str(target), "--layer=2"]) == 1
    text = " ".join(said(capsys).split())
    assert "relative error of gate_proj is 1." in text
    assert "holds other weights than those that were converted" in text
    write_checkpoint(source, "qwen3_moe", [0, 1, 2], E=E, I=I, H=H + 32, num_shards=2)
    assert main(["verify", str(target), "--layer=2"]) == 1
    assert "cannot be compared with the source: " in " ".join(said(capsys).split())


def test_verify_errors(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(target), "--layer=7"]) == 2
    assert "layer 7 is not there; layers that are there: 0, 1, 2" in only_error(capsys)
    path = target / "ktmoe.json"
    whole = json.loads(path.read_text())
    record = {"sha256": "", "relative_error": {}, "experts_checked": []}
    for change, message in [
        ({"format": "x"}, "format: got 'x', expected 'ktmoe-quantized'"),
        ({"version": 2}, "version: got 2, expected 1"),
        ({"source": 5}, "source: got 5, expected a string"),
        ({"method": None}, "method: got None, expected a string"),
        ({"method": "BF16"}, "method: got 'BF16', expected one of AMXINT8"),
        ({"group_size": "32"}, "group_size: got '32', expected a number or null"),
        ({"group_size": 5}, "group_size: got 5, expected None, 32, 64 or 128"),
        ({"layers": []}, "layers: got [], expected an object"),
        ({"layers": {"x": record}}, "layers: got 'x', expected numbers of layers"),
        ({"layers": {"1": 5}}, "layers.1: got 5, expected an object"),
        ({"layers": {"1": {**record, "sha256": 5}}}, "layers.1.sha256: got 5, expected a string"),
        (
            {"layers": {"1": {**record, "relative_error": 5}}},
            "layers.1.relative_error: got 5, expected an obj",
        ),
        ({"layers": {"1": {**record, "relative_error": {"a": "b"}}}}, "got {'a': 'b'}, expected numbers"),
        (
            {"layers": {"1": {**record, "experts_checked": 5}}},
            "layers.1.experts_checked: got 5, expected an a",
        ),
        ({"layers": {"1": {**record, "experts_checked": [None]}}}, "got [None], expected numbers of experts"),
    ]:
        path.write_text(json.dumps({**whole, **change}))
        assert main(["verify", str(target)]) == 2
        assert message in only_error(capsys)


def test_verify_computes_nothing_with_converted_files(
    target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(target), "--activation-dtype=int8"]) == 2
    line = only_error(capsys)
    assert f"--activation-dtype: got int8, expected auto: {target} was written by 'ktmoe convert'" in line
    assert main(["verify", str(target), "--activation-dtype=auto"]) == 0
