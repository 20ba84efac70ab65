"""The contenders: one module each, with a function `contenders`, a class `Contender` and names, `LIBRARIES`.

`contenders(base, options)` runs in the parent and gives the specs of what takes part; it must import nothing
heavy. `Contender(spec, layer)` runs in a process of its own, and loads the layer when it is made;
`LIBRARIES` are imported there before, so that loading is timed alone.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Protocol

from ..cases import Case
from ..layer import Array

__all__ = ["PEERS", "Contender", "find_peer"]

#: Name on the command line -> module.
PEERS = {"ktmoe": "ktmoe_peer", "torch": "torch_peer", "numpy": "numpy_peer", "kt-kernel": "kt_kernel_peer"}


class Contender(Protocol):
    """What a peer's class can do."""

    def prepare(self, cases: list[Case]) -> None:
        """Get ready for calls on these cases: convert what is not to be timed."""

    def run(self, i: int) -> None:
        """Do the timed call, on case i; returns when its result is there."""

    def output(self) -> Array:
        """Give the result of the last call, as float32 [T, H]."""

    def about(self) -> dict[str, Any]:
        """Version of the peer (``version``) and instruction set it chose (``isa``)."""


def find_peer(name: str) -> ModuleType:
    """Import the module of a peer.

    Raises
    ------
    ValueError
        There is none of that name.
    """
    if name not in PEERS:
        raise ValueError(f"peers: got {name!r}, expected some of {', '.join(PEERS)}")
    return importlib.import_module(f".{PEERS[name]}", __package__)
