"""ggml, the kernels of llama.cpp, by its C interface: the graph that llama.cpp makes of a layer of experts.

``--ggml`` or KTMOE_BENCH_GGML names a directory with its shared libraries (README.md says how to get them).
Weights go to the kind of memory that its backend prefers for the product of chosen experts, which may lay
them out anew.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from ...core.cases import Case
from ...core.layer import Array, Layer, to_float32
from ...core.methods import METHODS
from ...core.spec import Spec
from .interface import Ggml, Pointer

__all__ = ["LIBRARIES", "Backend", "backend_specs"]

#: Imported before the load is timed.
LIBRARIES: tuple[str, ...] = ()


def backend_specs(base: Spec, options: Any) -> list[Spec]:
    """Take all threads, and one fewer: its threads wait spinning."""
    if _type_name(base.method) is None:
        return []
    if not options.ggml:
        raise ValueError("ggml: expected a directory with its libraries, by --ggml or KTMOE_BENCH_GGML")
    spec = base.but(peer="ggml", family="ggml", gives_limits=False, best_of_family=True)
    spec = spec.but(options={"libraries": options.ggml}, copies=2 * METHODS[base.method].of_bf16)
    return [spec.but(threads=count) for count in (base.threads, base.threads - 1) if count >= 1]


def _type_name(method: str) -> str | None:
    """Name the type of a method's tensors, in capitals; None when ggml has none."""
    if method == "BF16":
        return "BF16"
    return method.removeprefix("LLAMAFILE-") if METHODS[method].library_name == "LLAMAFILE" else None


class Backend:
    """A layer of ggml."""

    def __init__(self, spec: Spec, layer: Layer) -> None:
        if spec.shape.biased or spec.shape.activation != "silu":
            raise NotImplementedError("ggml's graph is made for silu without biases")
        self._ggml, self._shape = Ggml(Path(spec.options["libraries"])), spec.shape
        self._float, self._int = self._ggml.type_of("F32"), self._ggml.type_of("I32")
        self._backend = self._ggml.backend(spec.threads)
        self._made: list[tuple[int, int]] = []  # contexts of graphs, and their memory
        self._load(spec, layer)

    def _load(self, spec: Spec, layer: Layer) -> None:
        encoded = METHODS[spec.method].encode(layer)
        number = self._ggml.type_of(_type_name(spec.method))
        hidden, inter, experts = spec.shape.hidden, spec.shape.inter, spec.shape.experts
        context = self._ggml.context()
        sizes = {"gate": (hidden, inter), "up": (hidden, inter), "down": (inter, hidden)}
        self._weights = {
            name: self._ggml.new_tensor_3d(context, number, columns, rows, experts)
            for name, (columns, rows) in sizes.items()
        }
        product = self._products(self._ggml.context(), 1, {"gate": self._weights["gate"]})["gate"]
        kind = self._ggml.memory_for(self._backend, self._weights["gate"], product)
        self._ggml.backend_alloc_ctx_tensors_from_buft(context, kind)
        self._memory = self._ggml.backend_buft_name(kind).decode()
        for name, tensor in self._weights.items():
            data = np.ascontiguousarray(encoded[f"{name}_proj"])
            assert data.nbytes == self._ggml.nbytes(tensor)
            self._ggml.backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)

    def _products(self, context: int, tokens: int, weights: dict[str, Pointer]) -> dict[str, Pointer]:
        """Inputs, and the products with some projections of the input."""
        ggml, per_token = self._ggml, self._shape.per_token
        made = {
            "x": ggml.new_tensor_3d(context, self._float, self._shape.hidden, 1, tokens),
            "ids": ggml.new_tensor_2d(context, self._int, per_token, tokens),
            "routing": ggml.new_tensor_3d(context, self._float, 1, per_token, tokens),
        }
        for name, tensor in weights.items():
            made[name] = ggml.mul_mat_id(context, tensor, made["x"], made["ids"])
        return made

    def prepare(self, cases: list[Case]) -> None:
        """See `bench.peers.Backend`; a graph for each case, so that its inputs are where they are read."""
        for context, memory in self._made:
            self._ggml.gallocr_free(memory)
            self._ggml.free(context)
        self._made.clear()
        self._graphs = [self._graph(case) for case in cases]

    def _graph(self, case: Case) -> tuple[int, Array]:
        """Make a graph with its inputs filled in; it, and its result to be."""
        ggml, tokens = self._ggml, len(case.x)
        hidden, per_token = self._shape.hidden, self._shape.per_token
        context = ggml.context()
        made = self._products(context, tokens, {name: self._weights[name] for name in ("gate", "up")})
        intermediate = ggml.swiglu_split(context, made["gate"], made["up"])
        outputs = ggml.mul_mat_id(context, self._weights["down"], intermediate, made["ids"])
        outputs = ggml.mul(context, outputs, made["routing"])
        row = hidden * 4
        slots = [
            ggml.view_2d(context, outputs, hidden, tokens, per_token * row, p * row) for p in range(per_token)
        ]
        total = slots[0] if per_token > 1 else ggml.cont(context, slots[0])
        for slot in slots[1:]:
            total = ggml.add(context, total, slot)

        inputs = {"x": to_float32(case.x), "ids": case.ids.astype(np.int32), "routing": case.weights}
        for name in inputs:
            ggml.set_input(made[name])
        ggml.set_output(total)
        graph = ggml.new_graph(context)
        ggml.build_forward_expand(graph, total)
        memory = ggml.gallocr_new(ggml.backend_cpu_buffer_type())
        self._made.append((context, memory))
        if not ggml.gallocr_alloc_graph(memory, graph):
            raise MemoryError("ggml: no memory for a graph")
        for name, values in inputs.items():
            values = np.ascontiguousarray(values)
            ctypes.memmove(ggml.get_data(made[name]), values.ctypes.data, values.nbytes)
        result = (ctypes.c_float * (tokens * hidden)).from_address(ggml.get_data(total))
        return graph, np.frombuffer(result, np.float32).reshape(tokens, hidden)

    def run(self, i: int) -> None:
        """See `bench.peers.Backend`."""
        graph, self._out = self._graphs[i]
        if self._ggml.backend_graph_compute(self._backend, graph) != 0:
            raise RuntimeError("ggml: the graph was not computed")

    def answer(self) -> dict[str, Array]:
        """See `bench.peers.Backend`."""
        return {"y": self._out}

    def about(self) -> dict[str, Any]:
        """See `bench.peers.Backend`."""
        return {"version": self._ggml.version().decode(), "isa": self._memory}
