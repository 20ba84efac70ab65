"""`ktmoe finetune` ended anywhere goes on to the files of a run that nothing ended, to the last byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import COMMAND, environment

KILLS = Path(__file__).parents[1] / "support" / "finetune_kills.py"
FILES = ["adapter_config.json", "adapter_model.safetensors", "loss.csv", "state.safetensors"]


# Slow: a run for every line at which it is ended, some hundred in all.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stride", "draw", "files"),
    [
        ("SIGKILL", 83, "no", FILES),
        ("SIGINT", 83, "no", FILES),
        ("SIGKILL", 613, "draw", [*FILES[:3], "loss.png", FILES[3]]),
    ],
)
def test_ended_at_any_line(name: str, stride: int, draw: str, files: list[str]) -> None:
    """Every day other lines, of some thousands."""
    if draw == "draw":
        pytest.importorskip("matplotlib")
    offset = int(time.time() // 86400) % stride
    done = subprocess.run(
        [sys.executable, KILLS, name, str(stride), draw, str(offset)],
        env=environment(OPENBLAS_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines, ended, *found = done.stdout.split()
    assert int(lines) > 1000
    assert int(ended) >= 0.9 * (int(lines) // stride)
    assert found == files


# Slow: four runs of the command, of which two are ended, and the model that comes with the package learns.
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ended_while_it_computes(number: signal.Signals, tmp_path: Path) -> None:
    """The command itself, on the model that comes with the package, ended over and over."""
    text = tmp_path / "text"
    text.write_bytes(b"In the beginning was the Word, and the Word was with God. " * 40)
    sizes = ("--batch=2", "--window=24", "--rank=2", "--rate=3e-3", "--every=2", "--steps=5", "--threads=1")
    command = [*COMMAND, "finetune", "--text", str(text), *sizes, "--out"]
    for out in ("whole", "ended"):
        tries = 0
        while True:
            child = subprocess.Popen(
                [*command, str(tmp_path / out)], env=environment(), stdout=-1, stderr=-1, text=True
            )
            if out == "ended" and tries < 2:
                time.sleep(0.7 + 0.9 * tries)
                child.send_signal(number)
            _, errors = child.communicate(timeout=200)
            assert "Traceback" not in errors
            if child.returncode == 0:
                break
            assert child.returncode == (130 if number == signal.SIGINT else -number)
            tries += 1
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    assert sorted(os.listdir(whole)) == sorted(os.listdir(ended))
    assert {"state.safetensors", "loss.csv", "loss.png"} <= set(os.listdir(whole))
    for path in whole.iterdir():
        assert path.read_bytes() == (ended / path.name).read_bytes(), path.name
