"""The files that the gates look at: what the project consists of, not what a build left beside it."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CPP_SUFFIXES = {".h", ".cpp", ".inc"}


def project_files() -> list[Path]:
    """Every file that version control holds or would hold."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in sorted(listed.split("\0")) if name and (path := ROOT / name).is_file()]


def files_under(*folders: str, suffixes: set[str]) -> list[Path]:
    """Project files with one of these suffixes below one of these folders of the project."""
    roots = [ROOT / folder for folder in folders]
    return [
        path
        for path in project_files()
        if path.suffix in suffixes and any(root in path.parents for root in roots)
    ]


def name_of(path: Path) -> str:
    """The path as messages give it, from the project's root."""
    return path.relative_to(ROOT).as_posix()
