"""The builds below build/, and their options."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

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


_INCLUDED = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def compile_commands(path: Path) -> list[dict[str, Any]]:
    """The entries of a compile_commands.json, one for each source where several are compiled as one."""
    entries = []
    for entry in json.loads(path.read_text()):
        source = Path(entry["directory"], entry["file"])
        if source.parent.name == "Unity":
            entries += [entry | {"file": included} for included in _INCLUDED.findall(source.read_text())]
        else:
            entries.append(entry)
    return entries
