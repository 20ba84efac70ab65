"""`ktmoe --print-completion`: scripts that shells run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import only_error

from ktmoe_np.cli import main
from ktmoe_np.cli.commands import _parser
from ktmoe_np.cli.completion import _FILES, _FOLDERS, SHELLS, _actions


def completed(words: list[str], folder: Path, script: str) -> list[str]:
    """What bash offers for the last word."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash: not installed")
    quoted = " ".join(f"'{word}'" for word in words)
    asked = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _shtab_ktmoe"
    line = f"{asked}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(
        [bash, "--norc", "-c", f"{script}\n{line}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.split())


def test_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "text.txt").touch()
    (tmp_path / "folder").mkdir()
    assert completed(["ktmoe", "fine"], tmp_path, script) == ["finetune", "finetune-demo"]
    assert completed(["ktmoe", "verify", "--la"], tmp_path, script) == ["--layer"]
    assert "text.txt" in completed(["ktmoe", "eval", "--text", "te"], tmp_path, script)
    assert [w.rstrip("/") for w in completed(["ktmoe", "demo", "--keep", ""], tmp_path, script)] == ["folder"]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["--print-completion", shell]) == 0
    assert "finetune-demo" in capsys.readouterr().out


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert "--print-completion needs: pip install shtab" in only_error(capsys)


def test_every_path_is_known_as_one() -> None:
    """An argument whose help speaks of a file or a folder has a name that says so."""
    for action in _actions(_parser()):
        words = set((action.help or "").lower().replace(",", " ").split())
        if action.metavar in (*_FILES, *_FOLDERS) or action.dest == "path":
            continue
        assert not words & {"directory", "folder"}, action
