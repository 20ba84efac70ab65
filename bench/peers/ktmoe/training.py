"""ktmoe_np's training of adapters. Option: ``arrays``, for the results, are given, new or reused."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.cases import Case
from ...core.layer import Array, Layer, bfloat16
from ...core.methods import METHODS
from ...core.spec import Spec
from .inference import LIBRARIES, make_layer
from .inference import backend_specs as of_inference

__all__ = ["LIBRARIES", "Backend", "backend_specs"]


def backend_specs(base: Spec, options: Any) -> list[Spec]:
    """One for each instruction set and each way to have arrays."""
    specs = of_inference(base, options)
    ways = ("new", "reused") if options.reuse_buffers else ()
    return specs + [
        spec.but(family=f"{spec.family} {way} arrays", options={"arrays": way}, gives_limits=False)
        for spec in specs
        for way in ways
    ]


class Backend:
    """A layer of ktmoe_np as in `ktmoe.inference`; given arrays are those of the step before."""

    def __init__(self, spec: Spec, layer: Layer) -> None:
        shape, self._method = spec.shape, spec.method
        self._arrays = spec.options.get("arrays", "given")
        options = {"mode": "sft", "lora_rank": shape.rank, "lora_alpha": shape.alpha}
        options["reuse_buffers"] = self._arrays == "reused"
        self._moe = make_layer(spec, layer, **options)
        self._moe.init_lora_weights(**layer.lora)
        self._adapter_bytes = sum(array.nbytes for array in layer.lora.values())
        self._names = tuple(layer.lora)
        self._gradients: Any = None

    def prepare(self, cases: list[Case]) -> None:
        """See `bench.peers.Backend`."""
        self._moe.clear_cache()  # of a call that failed between its passes
        self._gradients = None
        self._cases = cases
        self._out = np.empty(cases[0].x.shape, bfloat16)

    def run(self, i: int) -> None:
        """See `bench.peers.Trainer`."""
        case = self._cases[i]
        out = self._out if self._arrays == "given" else None
        self._out = self._moe.forward_sft(case.x, case.ids, case.weights, save_for_backward=True, out=out)

    def backward(self, i: int) -> None:
        """See `bench.peers.Trainer`."""
        given = self._gradients if self._arrays == "given" else None
        grad_input = None if given is None else given.grad_input
        self._gradients = self._moe.backward(self._cases[i].grad, gradients=given, grad_input=grad_input)

    def answer(self) -> dict[str, Array]:
        """See `bench.peers.Backend`."""
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
        """See `bench.peers.Backend`."""
        import ktmoe_np

        about = {"version": ktmoe_np.__version__, "isa": ktmoe_np.isa_info()["active"]}
        return {**about, "arrays": self._arrays}

    def limits(self, seconds: float) -> dict[str, Any]:
        """Measure what the machine can do with this backend's instruction set and threads."""
        from ktmoe_np import kt_kernel_ext as ext

        product = METHODS[self._method].product
        return dict(ext.measure_limits(self._moe.cpu_infer, seconds, product=product))
