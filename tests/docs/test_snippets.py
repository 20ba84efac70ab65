"""The documentation shows files that run: each snippet is run here, and paths that pages name are there."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import ktmoe_np
from ktmoe_np.models import EMBEDDED_MODEL

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SNIPPETS = DOCS / "snippets"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "generated" not in p.relative_to(DOCS).parts)

_FRAMEWORKS = {"jax", "torch", "transformers", "peft"}
_MPI = "mpi4py"
_NEEDS = re.compile(r"^# needs: (.+)$", re.MULTILINE)
_PASTED = re.compile(r"^```(python|py|bash|sh|console|shell)\n", re.MULTILINE)
_PATH = re.compile(r"`((?:tests|src|cpp|bench|tools|docs|cmake|\.ci)/[\w./-]*\w(?:\.\w+)?)`")


def _needs(path: Path) -> set[str]:
    """The packages that a snippet needs and this one does not."""
    found = _NEEDS.search(path.read_text())
    return set(found.group(1).split()) if found else set()


def _scripts() -> list[Any]:
    """All snippets in Python but programs of several ranks, which commands start.

    Those that need a framework are cross-checks.
    """
    return [
        pytest.param(path, id=path.stem, marks=[pytest.mark.crosscheck] if _FRAMEWORKS & _needs(path) else [])
        for path in sorted(SNIPPETS.glob("*.py"))
        if _MPI not in _needs(path)
    ]


def _commands() -> list[Any]:
    """All snippets for a shell; some start ranks."""
    return [
        pytest.param(path, id=path.stem, marks=[pytest.mark.mpi] if _MPI in _needs(path) else [])
        for path in sorted(SNIPPETS.glob("*.sh"))
    ]


def _put_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `ktmoe` and `python` the tests' own."""
    folder.mkdir()
    for name, arguments in (("ktmoe", "-m ktmoe_np.cli"), ("python", "")):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        command.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(Path(ktmoe_np.__file__).parents[1]))


@pytest.mark.parametrize("path", _scripts())
def test_a_snippet_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in sorted(_needs(path)):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with suppress(SystemExit):  # of a snippet for a machine that this one is not
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.subprocess
@pytest.mark.parametrize("path", _commands())
def test_a_command_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in sorted(_needs(path)):
        pytest.importorskip(package)
    if _MPI in _needs(path):
        if shutil.which("mpiexec") is None:
            pytest.skip("mpiexec: not installed")
        for name in ("ALLOW_RUN_AS_ROOT", "ALLOW_RUN_AS_ROOT_CONFIRM", "MCA_rmaps_base_oversubscribe"):
            monkeypatch.setenv(f"OMPI_{name}", "1")
        shutil.copy(SNIPPETS / "hosts.py", tmp_path / "program.py")
    _put_on_path(tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("model", str(EMBEDDED_MODEL))
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, "-euo", "pipefail", str(path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_snippet_is_on_a_page() -> None:
    text = "\n".join(path.read_text() for path in PAGES)
    files = [path.name for path in sorted(SNIPPETS.iterdir()) if path.suffix in (".py", ".sh", ".cpp")]
    assert files
    assert [name for name in files if f"snippets/{name}" not in text] == []


def test_pages_include_code() -> None:
    """Code that is pasted into a page is not under test.

    One page has a test of its own, in tests/compat; commands for several machines cannot run on one.
    """
    pasted = [(p.name, language) for p in PAGES for language in sorted(set(_PASTED.findall(p.read_text())))]
    assert pasted == [("from-kt-kernel.md", "python"), ("several-hosts.md", "bash")]


def test_every_path_on_a_page_is_there() -> None:
    named = {(p.name, found) for p in PAGES for found in _PATH.findall(p.read_text())}
    assert len(named) > 20
    missing = sorted(f"{page}: {path}" for page, path in named if not (ROOT / path).exists())
    assert not missing, "\n".join(missing)


def test_a_page_of_bits_names_tests_that_are_there() -> None:
    """Each guarantee has a test by file and name."""
    text = (DOCS / "concepts" / "bits.md").read_text()
    held = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(held) >= 15
    missing = [f"{file}::{name}" for file, name in held if f"def {name}(" not in (ROOT / file).read_text()]
    assert not missing, "\n".join(missing)
