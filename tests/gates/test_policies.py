"""A vector policy is one instruction set: it has no choices by the preprocessor and knows no format."""

from __future__ import annotations

import re

import pytest

from ._cpp import without_comments_and_texts
from ._tree import CPP_SUFFIXES, files_under, name_of

# A format has its decoding beside itself (cpp/formats), and a target header names the files of a policy.
_FORBIDDEN = re.compile(
    r"^\s*#\s*(?:if|ifdef|ifndef|elif|else)\b|\bformats\s*::|\w*(?:e[2-5]m[0-3]|fp[48](?!\d)|gguf)\w*",
    re.IGNORECASE,
)


def faults(source: str) -> list[str]:
    """Lines of a policy that choose by the preprocessor or name a format."""
    lines = without_comments_and_texts(source).splitlines()
    return [f"{i}: {line.strip()}" for i, line in enumerate(lines, 1) if _FORBIDDEN.search(line)]


def test_policies_make_no_choice_and_know_no_format() -> None:
    files = files_under("cpp/kernels/policy", suffixes=CPP_SUFFIXES)
    assert files
    found = [f"{name_of(path)}:{fault}" for path in files for fault in faults(path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "#if KT_HAS_TILES",
        "  # ifdef __AVX512BF16__",
        "static Segment e4m3_segment(const std::byte* p);",
        "struct E4m3Table {",
        "return kNvFp4.of[0];",
        "return formats::half_at(p);",
    ],
)
def test_the_gate_sees_them(line: str) -> None:
    assert faults("// #if in a comment\n" + line) == [f"2: {line.strip()}"]


def test_the_gate_lets_others_pass() -> None:
    assert not faults("#pragma once\nusing Fp32 = float;  // e4m3\nstatic Float load_f(const float* p);")
