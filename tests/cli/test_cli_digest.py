"""`ktmoe verify --digest`: the same bits as recorded, on every instruction set, and other bits are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import only_error, run_ktmoe

from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.cli import digest, main
from ktmoe_np.cli.digest import RECORDED, _numbers
from ktmoe_np.io.converted.manifest import manifest_path
from ktmoe_np.models import EMBEDDED_MODEL

#: What the packaged model has digests of.
CASES = [str(case) for case in digest._CASES]


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    status = main(["verify", "--digest", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.kernels
def test_bits_are_as_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    status, value = as_json(capsys)
    assert list(value["digests"]) == CASES
    assert (status, value["not_as_recorded"]) == (0, [])
    if ext.isa_info()["active"] != "amx":  # not recorded
        assert value["recorded"] == len(CASES)


@pytest.mark.subprocess
def test_threads_do_not_show(capsys: pytest.CaptureFixture[str]) -> None:
    _, value = as_json(capsys)
    one = run_ktmoe("verify", "--digest", "--json", "--threads", "1")
    assert one.returncode == 0, one.stderr
    assert json.loads(one.stdout)["digests"] == value["digests"]


def test_what_is_recorded() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert set(recorded) <= set(ext.isa_info()["known"])
    assert {"scalar", "avx2", "avx512", "avx512_bf16"} <= set(recorded)
    for found in recorded.values():
        assert list(found) == CASES
        assert all(len(digests) == 4 for digests in found.values())
    # Integer products are exact, and vectors of all widths have one activation function.
    vectors = [recorded[isa] for isa in ("avx2", "avx512", "avx512_bf16")]
    assert len({tuple(found["AMXINT4"][:3]) for found in vectors}) == 1
    assert recorded["scalar"]["BF16"] != recorded["avx512_bf16"]["BF16"]


def test_other_bits_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(digest, "RECORDED", tmp_path / "digests.json")
    monkeypatch.setattr(digest, "_CASES", digest._CASES[1:3])
    active = ext.isa_info()["active"]
    (tmp_path / "digests.json").write_text("{}")
    _, value = as_json(capsys)
    wrong = {**value["digests"], "AMXINT8": ["0" * 12] * 4}
    (tmp_path / "digests.json").write_text(json.dumps({active: wrong}))
    assert as_json(capsys)[1]["not_as_recorded"] == ["AMXINT8"]
    assert main(["verify", "--digest"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("AMXINT8 ")
    assert [line.split(maxsplit=5)[-1] for line in lines[3:5]] == ["DIFFERS", "as recorded"]
    (tmp_path / "digests.json").write_text("{}")
    assert main(["verify", "--digest"]) == 0
    assert f"Nothing is recorded for {active} in this version" in capsys.readouterr().out


def test_a_checkpoint_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(EMBEDDED_MODEL)
    assert main(["verify", path, "--digest", "--layer", "2", "--method", "AMXINT4"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[3].split()[0] == "AMXINT4"
    _, first = as_json(capsys, path, "--method", "AMXINT4")
    _, third = as_json(capsys, path, "--method", "AMXINT4", "--layer", "2")
    assert third["digests"]["AMXINT4"][0] in text
    assert first["digests"] != third["digests"]
    assert (first["recorded"], first["not_as_recorded"]) == (0, [])
    assert as_json(capsys, "--method", "AMXINT4", "--layer", "2") == (0, third)  # nothing is recorded for it
    _, own = as_json(capsys, path)
    assert list(own["digests"]) == ["as the checkpoint is"]


def test_numbers_are_the_same_everywhere() -> None:
    assert _numbers((4,), 1).tolist() == _numbers((2, 2), 1).ravel().tolist()
    drawn = _numbers((100_000,), 5)
    assert (drawn.dtype, abs(float(drawn.mean())) < 0.02) == (np.float32, True)
    assert -2 <= drawn.min() < -1.99
    assert 1.99 < drawn.max() < 2


def test_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["verify"]) == 2
    assert "path: got none, expected a checkpoint; with --digest it may be left out" in only_error(capsys)
    assert main(["verify", "--digest", "/nowhere"]) == 2
    assert "/nowhere" in only_error(capsys)
    manifest_path(tmp_path).touch()
    assert main(["verify", "--digest", str(tmp_path)]) == 2
    assert "written by 'ktmoe convert', expected a checkpoint" in only_error(capsys)
