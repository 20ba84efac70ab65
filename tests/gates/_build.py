"""What builds left below build/, and what they were asked for."""

from __future__ import annotations

import re
from pathlib import Path

from ._tree import ROOT


def built_cores() -> list[Path]:
    """The core as an archive, which keeps its symbols, of every build."""
    return sorted(ROOT.glob("build/*/libktmoe.a"))


def cache_entry(folder: Path, name: str) -> str:
    """A variable of the CMake cache in the folder of a build."""
    cache = (folder / "CMakeCache.txt").read_text()
    found = re.search(rf"^{name}:\w+=(.*)$", cache, re.MULTILINE)
    assert found, f"{folder}/CMakeCache.txt: no {name}"
    return found[1]
