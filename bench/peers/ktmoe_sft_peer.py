"""ktmoe_np's training of adapters."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cases import Case
from ..layer import Array, Layer, bfloat16
from ..methods import METHODS
from ..spec import Spec
from .ktmoe_peer import LIBRARIES, contenders, make_layer

__all__ = ["LIBRARIES", "Contender", "contenders"]


class Contender:
    """A layer of ktmoe_np as in `ktmoe_peer`, with arrays for gradients that are used again."""

    def __init__(self, spec: Spec, layer: Layer) -> None:
        shape, self._method = spec.shape, spec.method
        options = {"mode": "sft", "lora_rank": shape.rank, "lora_alpha": shape.alpha}
        self._moe = make_layer(spec, layer, **options)
        self._moe.init_lora_weights(**layer.lora)
        self._adapter_bytes = sum(array.nbytes for array in layer.lora.values())
        self._names = tuple(layer.lora)
        self._gradients: Any = None

    def prepare(self, cases: list[Case]) -> None:
        """See `bench.peers.Contender`."""
        self._moe.clear_cache()  # of a call that failed between its passes
        self._gradients = None
        self._cases = cases
        self._out = np.empty(cases[0].x.shape, bfloat16)

    def run(self, i: int) -> None:
        """See `bench.peers.Trainer`."""
        case = self._cases[i]
        self._moe.forward_sft(case.x, case.ids, case.weights, save_for_backward=True, out=self._out)

    def backward(self, i: int) -> None:
        """See `bench.peers.Trainer`."""
        grad_input = None if self._gradients is None else self._gradients.grad_input
        self._gradients = self._moe.backward(
            self._cases[i].grad, gradients=self._gradients, grad_input=grad_input
        )

    def answer(self) -> dict[str, Array]:
        """See `bench.peers.Contender`."""
        names = ("grad_input", "grad_weights", *self._names)
        return {"y": self._out} | {name: getattr(self._gradients, name) for name in names}

    def memory(self) -> dict[str, int]:
        """See `bench.peers.Trainer`."""
        case = self._cases[0]
        return {
            "results": self._out.nbytes + case.x.nbytes + case.weights.nbytes,
            "adapters": 2 * self._adapter_bytes,  # as they were given, and the engine's bf16 values
            "gradients": 2 * self._adapter_bytes,  # float32
            "cache": self._moe.cache_bytes,
        }

    def about(self) -> dict[str, Any]:
        """See `bench.peers.Contender`."""
        import ktmoe_np

        return {"version": ktmoe_np.__version__, "isa": ktmoe_np.isa_info()["active"]}

    def limits(self, seconds: float) -> dict[str, Any]:
        """Measure what the machine can do with this contender's instruction set and threads."""
        from ktmoe_np import kt_kernel_ext as ext

        product = METHODS[self._method].product
        return dict(ext.measure_limits(self._moe.cpu_infer, seconds, product=product))
