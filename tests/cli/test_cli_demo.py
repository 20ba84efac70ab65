"""`ktmoe demo`: its checks, its table, its picture, and what it says when something is wrong."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cli_runs import CONTROL, QUICK, only_error, run_ktmoe

from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.cli import demo, main, measure
from ktmoe_np.cli.checkpoint import CONFIG
from ktmoe_np.cli.sample import draw_routings, draw_sample
from ktmoe_np.config import MoEConfig
from ktmoe_np.io import SafetensorsFile, load_experts
from ktmoe_np.reference import moe_forward

EMULATED = ext.isa_info()["on_request"][0]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What ``demo --json`` says, and the folder with its checkpoint and picture."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_ktmoe("demo", "--json", *QUICK, "--keep", folder / "model", "--plot", folder / "bars.png")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout), folder


def test_demo_checks_every_instruction_set(demo_run: tuple[dict[str, Any], Path]) -> None:
    report, _ = demo_run
    rows = report["rows"]
    info = ext.isa_info()
    assert report["within_bound"]
    assert report["failures"] == {}
    assert [row["isa"] for row in rows] == [
        isa for isa in info["supported"] for _ in range(1 if isa in info["on_request"] else 3)
    ]
    assert {row["tokens"] for row in rows if row["isa"] == "scalar"} == {1, 16, 256}
    for row in rows:
        assert row["within_bound"]
        assert row["problem"] is None
        assert 0 <= row["error"] < row["bound"] < 0.2


def test_demo_times_are_consistent(demo_run: tuple[dict[str, Any], Path]) -> None:
    report, _ = demo_run
    emulated = ext.isa_info()["on_request"]
    timed = [row for row in report["rows"] if row["isa"] not in emulated]
    flop_per_token = (
        2 * 3 * CONFIG["hidden_size"] * CONFIG["moe_intermediate_size"] * CONFIG["num_experts_per_tok"]
    )
    for row in timed:
        seconds = row["ms"] / 1e3
        assert row["tflop_per_s"] * 1e12 * seconds == pytest.approx(row["tokens"] * flop_per_token)
        weights = row["gb_per_s"] * 1e9 * seconds
        assert 0 < weights <= report["checkpoint"]["weight_bytes"] / 2 * (1 + 1e-9)
        memory = row["gb_per_s"] / report["limits"]["read_gb_per_s"]
        arithmetic = row["tflop_per_s"] / report["limits"]["tflop_per_s"][row["isa"]]
        assert row["of_limit"] == pytest.approx(max(memory, arithmetic))
        assert row["limited_by"] == ("memory" if memory > arithmetic else "arithmetic")
    assert {row["ms"] for row in report["rows"] if row["isa"] in emulated} <= {None}


def test_demo_leaves_checkpoint_and_picture_where_asked(demo_run: tuple[dict[str, Any], Path]) -> None:
    _, folder = demo_run
    assert (folder / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "model" / "config.json").read_text()) == CONFIG
    names = SafetensorsFile(folder / "model" / "model.safetensors").names()
    for projection in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.1.mlp.experts.15.{projection}.weight" in names


def test_demo_does_not_overwrite(
    demo_run: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = demo_run
    assert main(["demo", "--keep", str(folder)]) == 2
    assert "got files in it, expected a new or an empty directory" in only_error(capsys)


@pytest.fixture
def fake_child(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Exception | float]], None]:
    """Have the demo's children answer at once: right, off by a factor, or with an error.

    The machine and the build have the same instruction sets everywhere, the emulator among them.
    """
    answers: dict[str, Exception | float] = {}
    isas = ["scalar", "avx2", EMULATED]

    def measured(isa: str, path: Path, layers: Any, tokens: Any, seconds: float, experts: int, _: Any) -> Any:
        answer = answers.get(isa, 1.0)
        if isinstance(answer, Exception):
            raise answer
        config = MoEConfig.from_hf_config(CONFIG, 0)
        sample, weights = draw_sample(config, experts), load_experts(path, 0)
        truth = moe_forward(sample.hidden_states, sample.ids, sample.weights, **weights.arguments())
        rows = (truth.astype(np.float32) * np.float32(answer)).astype(ml_dtypes.bfloat16)
        limits = {"read_bytes_per_s": 3e10, "dot_flop_per_s": 5e11, "step_flop_per_s": 4e11}
        return measure.Measured(
            isa,
            2,
            limits if seconds else None,
            {size: rows[:size] for size in tokens},
            {size: measure.Timing(1e-3, 24e6, 1e6 * size**1.1) for size in tokens if seconds},
        )

    for key, size in (("hidden_size", 64), ("moe_intermediate_size", 32)):
        monkeypatch.setitem(CONFIG, key, size)
    info = ext.isa_info() | {"active": "avx2", "compiled": isas, "supported": isas}
    monkeypatch.setattr(ext, "isa_info", lambda: info)
    monkeypatch.setattr(demo, "measure_in_child", measured)
    monkeypatch.setattr(demo, "busy_note", lambda: None)
    return answers.update


def test_demo_text(
    fake_child: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["demo", "--keep", str(tmp_path / "model")]) == 0
    text, errors = capsys.readouterr()
    lines = text.splitlines()
    assert errors == ""
    assert CONTROL.search(text) is None
    assert max(map(len, lines[:-1])) <= 100
    assert sum(line.startswith("avx2 ") for line in lines) == 3
    assert any(
        re.match(r"scalar +1 +(0|\d\.\de-\d\d) .* yes .* 24\.0 .* 80% memory$", line) for line in lines
    )
    assert any(re.match(rf"{EMULATED} +2 .* only checked$", line) for line in lines)
    said = " ".join(text.split())
    assert "Every result is within its bound;" in said
    assert "1 token at 80% of what memory allows" in said
    assert lines[-1].endswith(f"ktmoe verify {tmp_path / 'model'}")


def test_demo_says_what_is_wrong(fake_child: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    fake_child({"scalar": 1.5})
    assert main(["demo"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "WRONG on scalar, 16 tokens:" in said
    assert "elements are outside the bound" in said
    assert "please report" in said
    assert "Every result" not in said


def test_demo_goes_on_when_a_child_dies(
    fake_child: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_child({EMULATED: RuntimeError("ended by SIGILL")})
    assert main(["demo"]) == 1
    assert f"FAILED on {EMULATED}: ended by SIGILL" in capsys.readouterr().out
    assert main(["demo", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failures"] == {EMULATED: "ended by SIGILL"}


def test_demo_with_nothing_measured(
    fake_child: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_child(dict.fromkeys(ext.isa_info()["supported"], RuntimeError("no such thing")))
    assert main(["demo"]) == 2
    assert "scalar: no such thing" in only_error(capsys)


def test_children_report_how_they_failed(
    demo_run: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments: tuple[Any, ...] = (demo_run[1] / "model", [0], [1], 0.0, 2, None)
    with pytest.raises(RuntimeError, match="isa: got 'mmx'"):
        measure.measure_in_child("mmx", *arguments)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -ILL $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(RuntimeError, match=r"^ended by SIGILL$"):
        measure.measure_in_child("scalar", *arguments)


@pytest.mark.parametrize(
    ("path", "message"),
    [("bars.gif", "expected a file ending in .png, .svg, .pdf"), ("nowhere/bars.png", "does not exist")],
)
def test_bad_pictures_are_refused_at_once(
    path: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--plot", path]) == 2
    assert message in only_error(capsys)


def test_picture_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    assert main(["demo", "--plot", "bars.png"]) == 2
    assert only_error(capsys) == "ktmoe demo: --plot: needs matplotlib: pip install 'ktmoe_np[cli]'\n"


def test_routings_use_all_experts_before_any_again() -> None:
    config = MoEConfig(num_experts=12, num_experts_per_tok=3, hidden_size=8, moe_intermediate_size=8)
    ids = np.concatenate([ids.ravel() for ids, _ in draw_routings(config, 1)])
    assert sorted(ids.tolist()) == list(range(12))
    for ids, weights in draw_routings(config, 7):
        assert all(len(set(token)) == 3 for token in ids.tolist())
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
