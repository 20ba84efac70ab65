"""Errors of the package say what was given before what was expected: ``name: got X, expected Y``."""

from __future__ import annotations

import ast
import re

import pytest

from ._tree import files_under, name_of

#: What a message in the other order says: ``X must be Y, got Z``.
_OTHER_ORDER = re.compile(r"\bmust (?:be|have|hold)\b|, got ")


def messages_in_another_order(source: str) -> list[str]:
    """Lines of Python that raise an exception whose text, as it is written there, has the other order."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            text = "".join(
                part.value
                for part in ast.walk(node.exc)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            )
            if _OTHER_ORDER.search(text):
                found.append(f"{node.lineno}: {text}")
    return found


def test_errors_say_first_what_was_given() -> None:
    found = [
        f"{name_of(path)}:{line}"
        for path in files_under("src", suffixes={".py"})
        for line in messages_in_another_order(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        'raise ValueError("size must be at least 1, got 0")',
        'raise TypeError(f"{name} must be an integer, got {value!r}")',
        'raise ValueError(\n    f"{name} must have shape [N, K], "\n    f"got {shape}"\n)',
        'raise ValueError(f"{name} must hold {count} experts") from None',
        'raise ValueError(f"expected one model, got {count}")',
    ],
)
def test_the_gate_sees_the_other_order(line: str) -> None:
    assert messages_in_another_order(line)


@pytest.mark.parametrize(
    "line",
    [
        'raise ValueError("size: got 0, expected at least 1")',
        'raise RuntimeError("layer 3 has no weights yet, load them first")',
        'text = "size must be at least 1, got 0"',
        'def f():\n    """The size must be at least 1."""\n    raise ValueError',
    ],
)
def test_the_gate_leaves_the_others_alone(line: str) -> None:
    assert not messages_in_another_order(line)
