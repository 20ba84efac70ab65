"""A small checkpoint, and what `ktmoe convert` makes of it: fixtures and helpers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint

from ktmoe_np.cli import main
from ktmoe_np.io import SafetensorsFile

E, I, H = 6, 32, 64  # noqa: E741


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", "qwen3_moe", [0, 1, 2], E=E, I=I, H=H, num_shards=2)
    return tmp_path / "model"


@pytest.fixture
def target(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """What three layers were converted to."""
    assert run(source, tmp_path / "int4") == 0
    capsys.readouterr()
    return tmp_path / "int4"


def run(source: Path, target: Path, *more: str, method: str = "AMXINT4") -> int:
    return main(["convert", str(source), str(target), "--method", method, *more])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out, errors = capsys.readouterr()
    assert errors == ""
    return out


def name_of(layer: int) -> str:
    return f"layer-{layer:05}.safetensors"


def names_in(directory: Path) -> list[str]:
    """What is in a directory, but for the file that is locked to change the manifest."""
    return sorted(path.name for path in directory.iterdir() if path.name != ".ktmoe.lock")


def corrupt(path: Path, tensor: str, at: tuple[int, ...], value: int) -> None:
    """Change a byte of a tensor in place."""
    info = SafetensorsFile(path).info(tensor)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + info.begin + int(np.ravel_multi_index(at, info.shape))] = value
    path.write_bytes(data)
