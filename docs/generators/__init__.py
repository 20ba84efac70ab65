"""Pages and charts that are written at each build, from the registry, the command and records."""

from __future__ import annotations

from pathlib import Path

from . import charts, commands, families, layouts, placements, records

__all__ = ["write_all"]


def write_all(folder: Path) -> None:
    """Write all of them to a folder that version control leaves out."""
    folder.mkdir(exist_ok=True)
    runs = records.read_runs()
    pages = {
        "commands.md": commands.page(),
        "layouts.md": layouts.page(),
        "decoders.md": families.decoders(),
        "peft.md": families.peft(),
        "routing.rst": families.routing(),
        "layers.md": records.tables(records.compared(runs, "moe")),
        "training.md": records.tables(records.compared(runs, "sft")),
        "alone.md": records.tables(records.alone(runs)),
        "beside-a-gpu.md": placements.beside_a_gpu(),
        "on-ranks.md": placements.on_ranks(),
        "slower.md": records.slower(records.compared(runs, "moe") + records.compared(runs, "sft")),
    }
    for name, text in pages.items():
        _write(folder / name, text)
    charts.draw(runs, folder)


def _write(path: Path, text: str) -> None:
    """Write a page that has changed, so that Sphinx reads again only what did."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
