"""Backends that are compared: a package for each library, in it a module for each operation.

A module has a function `backend_specs`, a class `Backend` and names, `LIBRARIES`.

`backend_specs(base, options)` runs in the parent and gives the specs of what takes part; it must import
nothing heavy. `Backend(spec, layer)` runs in a process of its own, and loads the layer when it is made;
`LIBRARIES` are imported there before, so that loading is timed alone.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Protocol

from ..core.cases import Case
from ..core.layer import Array

__all__ = ["PEERS", "Backend", "Trainer", "find_peer"]

#: Operation -> name on the command line -> module.
PEERS = {
    "forward": {
        "ktmoe": "ktmoe.inference",
        "torch": "torch.inference",
        "numpy": "numpy.inference",
        "kt-kernel": "ktkernel.inference",
        "ggml": "llama_cpp.inference",
    },
    "sft": {"ktmoe": "ktmoe.training", "torch": "torch.training", "kt-kernel": "ktkernel.training"},
}


class Backend(Protocol):
    """What a peer's class can do."""

    def prepare(self, cases: list[Case]) -> None:
        """Get ready for calls on these cases: convert what is not to be timed."""

    def run(self, i: int) -> None:
        """Do the timed call, on case i; returns when its result is there."""

    def answer(self) -> dict[str, Array]:
        """Give the results of the last call: y [T, H], float32 or bf16.

        Of training also grad_input [T, H], grad_weights [T, P], and the adapters' gradients by their names.
        """

    def about(self) -> dict[str, Any]:
        """Version of the peer (``version``) and instruction set it chose (``isa``)."""


class Trainer(Backend, Protocol):
    """What a peer's class can do besides when it trains: a call is `run`, then `backward`."""

    def run(self, i: int) -> None:
        """Run case i forward, and keep what its backward pass needs."""

    def backward(self, i: int) -> None:
        """Compute the gradients of case i, which has just been run forward."""

    def memory(self) -> dict[str, int]:
        """Bytes that training takes as is documented, between the two passes.

        ``results``: output and the gradients of input and routing weights; ``adapters``: copies of those
        given; ``gradients``: theirs; ``cache``: what the backward pass needs, where a peer tells.
        """


def find_peer(name: str, operation: str = "forward") -> ModuleType:
    """Import the module of a peer.

    Raises
    ------
    ValueError
        There is none of that name.
    """
    peers = PEERS[operation]
    if name not in peers:
        raise ValueError(f"peers: got {name!r}, expected some of {', '.join(peers)}")
    return importlib.import_module(f".{peers[name]}", __package__)
