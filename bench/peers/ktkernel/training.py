"""kt-kernel's training of adapters, its extension module driven directly as in `ktkernel.inference`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.cases import Case
from ...core.layer import Array, Layer, bfloat16
from ...core.methods import METHODS
from ...core.spec import Spec
from .inference import LIBRARIES
from .inference import Backend as ForwardBackend
from .inference import backend_specs as forward_specs
from .memory import address, aligned

__all__ = ["LIBRARIES", "Backend", "backend_specs"]

#: The most tokens that it is told must be a multiple of this.
_STEP = 32

#: In the order of its arguments.
_ADAPTERS = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


def backend_specs(base: Spec, options: Any) -> list[Spec]:
    """Take the same numbers of threads as forward; weights are packed once for each direction."""
    copies = 2 * METHODS[base.method].of_bf16
    return [spec.but(copies=copies) for spec in forward_specs(base, options)]


class Backend(ForwardBackend):
    """A layer of kt-kernel that uses the adapters where they lie and writes their gradients in bf16."""

    def _load(self, spec: Spec, layer: Layer) -> Any:
        shape = spec.shape
        config = self._ext.moe.MOESFTConfig()
        config.expert_num, config.num_experts_per_tok = shape.experts, shape.per_token
        config.hidden_size, config.intermediate_size = shape.hidden, shape.inter
        config.layer_idx, config.max_cache_depth = 0, 1
        config.lora_rank, config.lora_alpha = shape.rank, shape.alpha
        self._configure(config, spec, layer)
        config.max_len = -(-spec.max_tokens // _STEP) * _STEP
        self._adapters = {name: aligned(layer.lora[name]) for name in _ADAPTERS}
        for name, adapter in self._adapters.items():
            setattr(config, name, address(adapter))
        moe = self._class(spec.method)(config)
        self._engine.submit(moe.load_weights_task())
        self._engine.sync()
        self._gradients = {name: aligned(np.zeros_like(layer.lora[name])) for name in _ADAPTERS}
        return moe

    def prepare(self, cases: list[Case]) -> None:
        """See `bench.peers.Backend`."""
        self._cases = cases = [Case(*(None if a is None else aligned(a) for a in case)) for case in cases]
        for gradient in self._gradients.values():
            gradient[...] = 0  # some are added to what is there
        x, ids, weights, _ = cases[0]
        self._batch = aligned(np.array([len(x)], np.int32))
        self._out, self._grad_input = (aligned(np.empty(x.shape, bfloat16)) for _ in range(2))
        self._grad_weights = aligned(np.empty(weights.shape, np.float32))
        begin, out = (address(self._batch), ids.shape[1]), address(self._out)
        self._calls = [(*begin, *map(address, (c.ids, c.weights, c.x)), out, True) for c in cases]
        matrices = [address(self._gradients[name]) for name in _ADAPTERS]
        end = (address(self._grad_input), *matrices, address(self._grad_weights), 0, 0, 0)
        self._backward_calls = [(address(c.grad), *end) for c in cases if c.grad is not None]

    def run(self, i: int) -> None:
        """See `bench.peers.Trainer`."""
        self._engine.submit(self._moe.forward_sft_task(*self._calls[i]))
        self._engine.sync()

    def backward(self, i: int) -> None:
        """See `bench.peers.Trainer`."""
        self._engine.submit(self._moe.backward_task(*self._backward_calls[i]))
        self._engine.sync()

    def answer(self) -> dict[str, Array]:
        """See `bench.peers.Backend`."""
        of_tokens = {"y": self._out, "grad_input": self._grad_input, "grad_weights": self._grad_weights}
        return of_tokens | self._gradients

    def memory(self) -> dict[str, int]:
        """See `bench.peers.Trainer`."""
        results = (self._out, self._grad_input, self._grad_weights)
        return {
            "results": sum(array.nbytes for array in results),
            "adapters": sum(array.nbytes for array in self._adapters.values()),
            "gradients": sum(array.nbytes for array in self._gradients.values()),
        }
