"""The core does not print or end the process, only the command prints, no file mentions local paths.

Markers stand in files of tests, where .ci/run looks for them.
"""

from __future__ import annotations

import ast
import re

import pytest

from ._cpp import without_comments_and_texts
from ._tree import CPP_SUFFIXES, ROOT, files_under, name_of, project_files

_FORBIDDEN_CALLS = re.compile(
    r"\b(?:f|v|vf)?printf\s*\(|\bputs\s*\(|\bperror\s*\(|\bstd\s*::\s*(?:cout|cerr|clog)\b"
    r"|\b(?:abort|exit|_exit|quick_exit|terminate)\s*\(|\bassert\s*\("
)
# Written in pieces, or this file would be the first to be found.
_FORBIDDEN_PATHS = re.compile("/" + "work/|/" + r"tmp/|/" + r"root/|/" + r"home/\w")
_TEXT_SUFFIXES = CPP_SUFFIXES | {
    ".py",
    ".pyi",
    ".md",
    ".toml",
    ".txt",
    ".json",
    ".yaml",
    ".yml",
    ".cmake",
    ".jsonl",
    "",
}


def forbidden_calls(source: str) -> list[str]:
    """Lines of C++ that print or end the process, outside comments and texts."""
    lines = without_comments_and_texts(source).splitlines()
    return [f"{i}: {line.strip()}" for i, line in enumerate(lines, 1) if _FORBIDDEN_CALLS.search(line)]


def print_calls(source: str) -> list[int]:
    """Lines of Python that call print."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def test_the_core_neither_prints_nor_ends_the_process() -> None:
    found = [
        f"{name_of(path)}:{line}"
        for path in files_under("cpp", suffixes=CPP_SUFFIXES)
        for line in forbidden_calls(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_the_package_prints_in_its_command_alone() -> None:
    found = [
        f"{name_of(path)}:{line}"
        for path in files_under("src", suffixes={".py"})
        if "cli" not in path.parts
        for line in print_calls(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_no_text_names_a_path_of_a_workplace() -> None:
    found = []
    for path in project_files():
        if path.suffix not in _TEXT_SUFFIXES:
            continue
        for i, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if _FORBIDDEN_PATHS.search(line):
                found.append(f"{name_of(path)}:{i}: {line.strip()}")
    assert not found, "\n".join(found)


def test_markers_stand_in_the_files_of_tests() -> None:
    markers = re.findall(r"\$\(files_with (\w+)\)", (ROOT / ".ci" / "run").read_text())
    assert markers
    wanted = re.compile(rf"\bmark\.(?:{'|'.join(markers)})\b")
    helpers = [path for path in files_under("tests", suffixes={".py"}) if not path.name.startswith("test_")]
    found = [name_of(path) for path in helpers if wanted.search(path.read_text())]
    assert helpers
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        'printf("x");',
        "std::cout << x;",
        "std :: cerr << x;",
        "std::abort();",
        "exit (1);",
        "std::terminate();",
        "assert(x);",
    ],
)
def test_the_gate_sees_a_forbidden_call(line: str) -> None:
    assert forbidden_calls(line)
    assert not forbidden_calls("// " + line)
    assert not forbidden_calls("/* " + line + " */")


@pytest.mark.parametrize(
    "line", ["snprintf(b, n, x);", "std::atexit(f);", "static_assert(x);", "on_exit_(1);"]
)
def test_the_gate_leaves_others_alone(line: str) -> None:
    assert not forbidden_calls(line)


def test_the_gate_sees_a_print() -> None:
    assert print_calls("def f():\n    print(1)\n") == [2]
    assert not print_calls("# print(1)\nx = 'print(1)'\n")
