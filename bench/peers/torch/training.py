"""PyTorch's autograd on the CPU, bf16: a loop over the experts in use, a leaf for each expert's adapters."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.cases import Case
from ...core.layer import Array, Layer
from ...core.spec import Spec
from .inference import LIBRARIES
from .inference import Backend as ForwardBackend

__all__ = ["LIBRARIES", "Backend", "backend_specs"]


def backend_specs(base: Spec, options: Any) -> list[Spec]:
    """One, of bf16 weights."""
    if base.method != "AMXBF16_SFT":
        raise ValueError(
            f"torch: takes no part in {base.method}: autograd would run on weights that were decoded to bf16 "
            "beforehand, which is AMXBF16_SFT"
        )
    return [base.but(peer="torch", family="torch autograd", options={"way": "loop"}, gives_limits=False)]


class Backend(ForwardBackend):
    """Weights and adapters are the shared ones; gradients are new tensors in each step."""

    def __init__(self, spec: Spec, layer: Layer) -> None:
        super().__init__(spec, layer)
        self._torch.set_grad_enabled(True)
        self._scale = spec.shape.alpha / spec.shape.rank
        self._lora = {
            name: [matrix.requires_grad_() for matrix in self._tensor(adapter).unbind()]
            for name, adapter in layer.lora.items()
        }

    def prepare(self, cases: list[Case]) -> None:
        """See `bench.peers.Backend`."""
        super().prepare(cases)
        for x, _, weights in self._cases:
            x.requires_grad_()
            weights.requires_grad_()
        self._grads = [self._tensor(case.grad) for case in cases if case.grad is not None]

    def run(self, i: int) -> None:
        """See `bench.peers.Trainer`."""
        x, ids, weights = self._cases[i]
        order = ids.flatten().argsort(stable=True)
        counts = self._torch.bincount(ids.flatten(), minlength=self._shape.experts).tolist()
        self._used = [e for e, count in enumerate(counts) if count]
        rows = x.index_select(0, order // ids.shape[1]).split([counts[e] for e in self._used])
        parts = [self._expert(e, part) for e, part in zip(self._used, rows, strict=True)]
        slots = self._torch.cat(parts).index_select(0, order.argsort()).view(*ids.shape, -1)
        self._out = (slots.float() * weights[:, :, None]).sum(1).bfloat16()

    def _expert(self, e: int, x: Any) -> Any:
        hidden = self._activate(self._project("gate", e, x), self._project("up", e, x))
        return self._project("down", e, hidden)

    def _project(self, name: str, e: int, x: Any) -> Any:
        linear = self._torch.nn.functional.linear
        weights, bias = self._projections[name]
        base = linear(x, weights[e], None if bias is None else bias[e])
        lora_hidden = linear(x, self._lora[f"{name}_lora_a"][e])
        return base.add(linear(lora_hidden, self._lora[f"{name}_lora_b"][e]), alpha=self._scale)

    def backward(self, i: int) -> None:
        """See `bench.peers.Trainer`."""
        x, _, weights = self._cases[i]
        leaves = [matrices[e] for matrices in self._lora.values() for e in self._used]
        self._gradients = self._torch.autograd.grad(self._out, [x, weights, *leaves], self._grads[i])

    def answer(self) -> dict[str, Array]:
        """See `bench.peers.Backend`."""
        of_x, of_weights, *of_leaves = (gradient.float().numpy() for gradient in self._gradients)
        answer = {"y": self._out.detach().float().numpy(), "grad_input": of_x, "grad_weights": of_weights}
        used = len(self._used)
        for k, (name, matrices) in enumerate(self._lora.items()):
            answer[name] = np.zeros((len(matrices), *matrices[0].shape), np.float32)
            answer[name][self._used] = of_leaves[k * used : (k + 1) * used]
        return answer

    def memory(self) -> dict[str, int]:
        """See `bench.peers.Trainer`."""
        x, _, weights = self._cases[0]
        matrices = sum(part[0].nbytes for part in self._lora.values())
        return {
            "results": 2 * x.nbytes + weights.nbytes,
            "adapters": 0,
            "gradients": len(self._used) * matrices,
        }
