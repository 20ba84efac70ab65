"""One version, wherever a file states it."""

from __future__ import annotations

import re
import tomllib

import pytest

import ktmoe_np

from ._tree import ROOT


def version_of_project() -> str:
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("src/ktmoe_np/__init__.py", r'^__version__ = "(.+)"$'),
        ("CMakeLists.txt", r"^project\(ktmoe VERSION (\S+)"),
        ("CITATION.cff", r"^version: (.+)$"),
        ("CHANGELOG.md", r"^## \[(\d.+)\] - \d{4}-\d\d-\d\d$"),
    ],
)
def test_a_file_states_the_version(name: str, pattern: str) -> None:
    found = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
    assert found is not None
    assert found.group(1) == version_of_project()


def test_the_release_has_one_date() -> None:
    changelog = re.search(r"^## \[\d.+\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = re.search(r"^date-released: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert changelog is not None
    assert citation is not None
    assert changelog.group(1) == citation.group(1)
    assert ktmoe_np.__version__ == version_of_project()
