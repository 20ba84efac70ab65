"""Phrases that the project does not use, and what it writes instead; codespell checks the spelling."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ._tree import CPP_SUFFIXES, ROOT, name_of, project_files

#: What is searched -> what to write instead.
_PHRASES = {
    r"\b(?:arrays|programs|buffers) of (?:JAX|NumPy|torch|XLA)\b": "JAX arrays",
    r"\b(?:checkpoint|model|optimizer|program) of yours\b": "your checkpoint",
    r"\bproducts of (?:bf16|int8)\b": "bf16 products",
    r"\b(?:line|bit|byte|entry|target|file)s? an? (?:byte|weight|format|layer|token|row|expert|value)\b": (
        "one line per format; bits per byte"
    ),
    r"\bwhat the machine is\b": "machine information",
    r"\basked for ahead\b": "prefetched",
    r"\b(?:rows|columns) lie apart\b": "rows are strided",
    r"\bsays? (?:itself|themselves)\b": "carries its own type",
    r"\b(?:go|goes|gone|went) on with\b": "continue, resume",
    r"\b[Nn]obody waits\b": "only the stream waits",
    r"\blearn a text\b": "fine-tune on a text",
}
_SUFFIXES = CPP_SUFFIXES | {".py", ".md", ".sh", ".toml", ".cmake", ".inc"}


def _texts() -> list[Path]:
    return [
        p
        for p in project_files()
        if p.suffix in _SUFFIXES and p != Path(__file__) and "embedded" not in p.parts
    ]


@pytest.mark.parametrize("phrase", _PHRASES)
def test_a_phrase_is_not_used(phrase: str) -> None:
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in _texts()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(phrase, line)
    ]
    assert not found, f"write: {_PHRASES[phrase]}\n" + "\n".join(found)


def test_many_files_are_read() -> None:
    names = {name_of(path) for path in _texts()}
    assert {"README.md", "pyproject.toml", "docs/glossary.md", "cpp/kernels/contract.h"} <= names
    assert ROOT / "README.md" in _texts()
