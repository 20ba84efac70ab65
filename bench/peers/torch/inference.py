"""PyTorch on the CPU: a loop over the experts in use, and of bf16 weights grouped_mm where torch has it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.cases import Case
from ...core.layer import Array, Layer
from ...core.spec import Spec
from .quantized import FORMATS, QuantizedLinear

__all__ = ["LIBRARIES", "Backend", "backend_specs"]

#: Imported before the load is timed.
LIBRARIES: tuple[str, ...] = ("torch",)


def backend_specs(base: Spec, options: Any) -> list[Spec]:
    """Two ways of writing it with bf16 weights; with quantized ones the loop alone."""
    spec = base.but(peer="torch", gives_limits=False)
    if base.method in FORMATS:
        quantized = FORMATS[base.method]
        return [spec.but(family=quantized.family, copies=quantized.copies, options={"way": "loop"})]
    if base.method != "BF16":
        return []
    return [
        spec.but(family="torch loop", options={"way": "loop"}),
        spec.but(family="torch grouped_mm", options={"way": "grouped"}),
    ]


class Backend:
    """The shared bf16 weights as torch tensors, not copied; or quantized copies."""

    def __init__(self, spec: Spec, layer: Layer) -> None:
        import torch

        torch.set_num_threads(spec.threads)
        torch.set_grad_enabled(False)
        self._torch, self._shape = torch, spec.shape
        self._gate, self._up, self._down = map(self._tensor, (layer.gate, layer.up, layer.down))
        self._linear: Any = torch.nn.functional.linear
        if spec.method in FORMATS:
            self._linear = QuantizedLinear(spec.method, spec.shape)
            self._gate, self._up, self._down = map(self._linear.pack, (self._gate, self._up, self._down))
        biases = (layer.gate_bias, layer.up_bias, layer.down_bias)
        self._biases = [None if b is None else torch.from_numpy(b).bfloat16() for b in biases]
        weights = zip((self._gate, self._up, self._down), self._biases, strict=True)
        self._projections = dict(zip(("gate", "up", "down"), weights, strict=True))
        self._experts = self._loop if spec.options["way"] == "loop" else self._grouped
        if self._experts == self._grouped and not hasattr(torch, "_grouped_mm"):
            raise RuntimeError(f"torch {torch.__version__} has no grouped_mm")

    def _tensor(self, array: Array) -> Any:
        return self._torch.from_numpy(array.view(np.int16)).view(self._torch.bfloat16)

    def prepare(self, cases: list[Case]) -> None:
        """See `bench.peers.Backend`."""
        tensor, as_it_is = self._tensor, self._torch.from_numpy
        self._cases = [(tensor(x), as_it_is(ids), as_it_is(weights)) for x, ids, weights, _ in cases]

    def run(self, i: int) -> None:
        """See `bench.peers.Backend`."""
        x, ids, weights = self._cases[i]
        order = ids.flatten().argsort(stable=True)
        rows = order // ids.shape[1]
        ends = self._torch.bincount(ids.flatten(), minlength=self._shape.experts).cumsum(0)
        y = self._experts(x[rows], ids.flatten()[order], ends)
        out = self._torch.zeros(x.shape, dtype=self._torch.float32)
        out.index_add_(0, rows, y.float() * weights.flatten()[order, None])
        self._out = out.bfloat16()

    def _loop(self, x: Any, experts: Any, ends: Any) -> Any:
        y = self._torch.empty_like(x)
        linear = self._linear
        begin = 0
        for e, end in enumerate(ends.tolist()):
            if end > begin:
                gate_bias, up_bias, down_bias = (None if b is None else b[e] for b in self._biases)
                rows = x[begin:end]
                hidden = self._activate(
                    linear(rows, self._gate[e], gate_bias), linear(rows, self._up[e], up_bias)
                )
                y[begin:end] = linear(hidden, self._down[e], down_bias)
            begin = end
        return y

    def _grouped(self, x: Any, experts: Any, ends: Any) -> Any:
        ends = ends.to(self._torch.int32)

        def linear(rows: Any, weight: Any, bias: Any) -> Any:
            product = self._torch._grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
            return product if bias is None else product + bias[experts]

        gate_bias, up_bias, down_bias = self._biases
        hidden = self._activate(linear(x, self._gate, gate_bias), linear(x, self._up, up_bias))
        return linear(hidden, self._down, down_bias)

    def _activate(self, gate: Any, up: Any) -> Any:
        if self._shape.activation == "silu":
            return self._torch.nn.functional.silu(gate) * up
        if self._shape.activation == "swigluoai":
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            return gate * self._torch.sigmoid(1.702 * gate) * (up + 1)
        raise ValueError(f"activation {self._shape.activation!r}: not written for torch")

    def answer(self) -> dict[str, Array]:
        """See `bench.peers.Backend`."""
        return {"y": self._out.float().numpy()}

    def about(self) -> dict[str, Any]:
        """See `bench.peers.Backend`."""
        return {"version": self._torch.__version__, "isa": self._torch.backends.cpu.get_cpu_capability()}
