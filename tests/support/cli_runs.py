"""Helpers for the tests of the command `ktmoe`."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ktmoe_np

COMMAND = [sys.executable, "-m", "ktmoe_np.cli"]
QUICK = ["--seconds", "0.01"]
CONTROL = re.compile(r"[^\n -~]")  # anything but printable ASCII and newlines


def environment(**more: str) -> dict[str, str]:
    """What a process needs to find the package under test."""
    source = str(Path(ktmoe_np.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **more}


def run_ktmoe(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, its output piped; `more` goes into its environment."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; nothing on stdout."""
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.count("\n") == 1
    return errors


def shown(raw: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    screen = []
    for line in raw.replace("\r\n", "\n").split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            part = re.sub(r"\x1b\[[A-Z]", "", part)
            cells[: len(part)] = part
        screen.append("".join(cells).rstrip())
    return screen


def shown_on_terminal(command: list[str], env: dict[str, str], **streams: Any) -> bytes:
    """What a command that ends well writes to the terminal that its standard error is."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(command, env=env, stderr=theirs, **{"stdout": theirs, **streams})
    os.close(theirs)
    raw = b""
    try:
        while chunk := os.read(ours, 4096):
            raw += chunk
    except OSError:  # a terminal without writers gives this
        pass
    os.close(ours)
    assert child.wait(60) == 0
    return raw
