"""NumPy with float32 weights, widened once at load: what one writes without any library."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.cases import Case
from ...core.layer import Array, Layer, to_float32
from ...core.reference import expert_output
from ...core.spec import Spec

__all__ = ["LIBRARIES", "Backend", "backend_specs"]

#: Imported before the load is timed.
LIBRARIES: tuple[str, ...] = ()


def backend_specs(base: Spec, options: Any) -> list[Spec]:
    """One."""
    if (base.operation, base.method) != ("forward", "BF16"):
        return []
    return [base.but(peer="numpy", family="numpy float32", copies=2.0, gives_limits=False)]


class Backend:
    """Matrix products expert by expert."""

    def __init__(self, spec: Spec, layer: Layer) -> None:
        self._layer = layer
        self._matrices = [
            (to_float32(layer.gate[e]), to_float32(layer.up[e]), to_float32(layer.down[e]))
            for e in range(spec.shape.experts)
        ]
        self._cases: list[Case] = []

    def prepare(self, cases: list[Case]) -> None:
        """See `bench.peers.Backend`."""
        self._cases = [case._replace(x=to_float32(case.x)) for case in cases]

    def run(self, i: int) -> None:
        """See `bench.peers.Backend`."""
        x, ids, routing, _ = self._cases[i]
        self._out = np.zeros_like(x)
        for e in np.unique(ids):
            t, p = np.nonzero(ids == e)
            self._out[t] += expert_output(self._layer, e, x[t], self._matrices[e]) * routing[t, p, None]

    def answer(self) -> dict[str, Array]:
        """See `bench.peers.Backend`."""
        return {"y": self._out}

    def about(self) -> dict[str, Any]:
        """See `bench.peers.Backend`."""
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return {"version": np.__version__, "isa": f"{blas.get('name')} {blas.get('version')}"}
