"""Every public name is in the reference of the documentation."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

_REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
_DOCUMENTED = re.compile(r"^\.\. auto(?:class|data|function):: (\S+)$", re.MULTILINE)

#: Public module -> the packages that it needs.
_MODULES = {
    "ktmoe_np": (),
    "ktmoe_np.compat.kt_kernel": ("torch",),
    "ktmoe_np.distributed": (),
    "ktmoe_np.io": (),
    "ktmoe_np.jax": ("jax",),
    "ktmoe_np.models": (),
    "ktmoe_np.reference": (),
    "ktmoe_np.sft": (),
    "ktmoe_np.torch": ("torch",),
}


def _documented() -> list[str]:
    pages = [page.read_text() for page in sorted(_REFERENCE.glob("*.md"))]
    return [name for page in pages for name in _DOCUMENTED.findall(page)]


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(module, marks=[pytest.mark.crosscheck] if packages else [])
        for module, packages in _MODULES.items()
    ],
)
def test_public_names_are_in_the_reference(module: str) -> None:
    for package in _MODULES[module]:
        pytest.importorskip(package)
    public = importlib.import_module(module)
    names = [n for n in public.__all__ if n[0] != "_" and not isinstance(getattr(public, n), ModuleType)]
    assert names
    # Some names can be imported from two places, and have one entry.
    missing = set(names) - {name.rpartition(".")[2] for name in _documented()}
    assert not missing, f"no autoclass, autofunction or autodata for {sorted(missing)}"


def test_no_name_has_two_entries() -> None:
    names = _documented()
    assert sorted(set(names)) == sorted(names)
