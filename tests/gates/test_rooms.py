"""Who may import whom within the package: DESIGN.md's table of folders, from the top down."""

from __future__ import annotations

import re

import pytest

from ._tree import ROOT
from .test_includes import _imports

_PACKAGE = "ktmoe_np"
# The package itself and what it offers: they gather names of all rooms, lazily.
_FACE = {"", "_api"}
# What modules of any room may import of the package itself.
_ANYWHERE = {"kt_kernel_ext", "__version__"}
# Production is tested against the reference, so it may not be made of it.
_MAY_IMPORT_REFERENCE = {"cli", "reference"}


def rooms_of(design: str) -> dict[str, int]:
    """The folders and modules of the table with the numbers of their rows."""
    table = design[design.index("The Python package, from the top down") :]
    rows = re.findall(r"^\| (`[^|]*`) \|", table[: table.index("\n\nGates in")], re.MULTILINE)
    return {
        name.removesuffix(".py").removesuffix("/"): number
        for number, row in enumerate(rows)
        for name in re.findall(r"`([^`]+)`", row)
    }


def room_of(module: str) -> str:
    """The folder or module below the package that a module is, or is part of."""
    return module.split(".")[1] if "." in module else ""


def arrow_faults(module: str, imported: set[str], rooms: dict[str, int]) -> list[str]:
    """What is wrong with what a module imports."""
    own = room_of(module)
    if own in _FACE:
        return []
    if own not in rooms:
        return [f"{module}: {own} is not in DESIGN.md's table of the package"]
    faults = []
    for name in sorted(imported):
        if name == _PACKAGE or not name.startswith(f"{_PACKAGE}."):
            continue
        other = room_of(name)
        if other in _ANYWHERE or other == own:
            continue
        if other not in rooms:
            faults.append(f"{module} imports {name}: not a room of DESIGN.md's table")
        elif rooms[other] <= rooms[own]:
            faults.append(f"{module} imports {name}: {other} is not below {own}")
        if other == "reference" and own not in _MAY_IMPORT_REFERENCE:
            faults.append(f"{module} imports {name}: only the command compares with the reference")
    return faults


ROOMS = rooms_of((ROOT / "DESIGN.md").read_text())


def test_the_table_has_the_rooms_that_there_are() -> None:
    there = {room_of(module) for module in _imports()} - _FACE
    assert ROOMS.keys() == there


def test_rooms_import_downwards() -> None:
    faults = [fault for module, names in _imports().items() for fault in arrow_faults(module, names, ROOMS)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("module", "imported", "fault"),
    [
        ("ktmoe_np.arrays.checks", "ktmoe_np.io.native", "io is not below arrays"),
        ("ktmoe_np.sft.base", "ktmoe_np.inference.base", "inference is not below sft"),
        ("ktmoe_np.arrays.library", "ktmoe_np.reference.activation", "only the command"),
        ("ktmoe_np.models.decoder", "ktmoe_np.reference", "only the command"),
        ("ktmoe_np.io.native", "ktmoe_np._api", "not a room"),
        ("ktmoe_np.corridor", "numpy", "not in DESIGN.md's table"),
    ],
)
def test_the_gate_sees_a_wrong_arrow(module: str, imported: str, fault: str) -> None:
    (found,) = arrow_faults(module, {imported}, ROOMS)
    assert fault in found


def test_the_gate_leaves_right_arrows_alone() -> None:
    assert not arrow_faults("ktmoe_np.cli.sample", {"ktmoe_np.reference", "ktmoe_np.io"}, ROOMS)
    assert not arrow_faults("ktmoe_np.io.native", {"ktmoe_np", "ktmoe_np.kt_kernel_ext", "os"}, ROOMS)
    assert not arrow_faults("ktmoe_np", {"ktmoe_np._api", "ktmoe_np.reference"}, ROOMS)
