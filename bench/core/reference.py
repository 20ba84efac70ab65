"""What the answer is: the layer in float32, without any rounding between, for as many rows as is cheap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .cases import Case
from .layer import Array, Layer, bfloat16, to_float32

__all__ = [
    "Sample",
    "activate",
    "choose_rows",
    "expert_output",
    "reference_answer",
    "relative_error",
    "sample_rows",
    "to_int8_and_back",
]

#: What the reference may cost: weights to widen, and operations.
_MAX_WEIGHTS, _MAX_FLOP = 1.5e9, 4e11


class Sample(NamedTuple):
    """What of an answer is checked."""

    rows: Array  # tokens, of what has a row for each of them
    experts: Array  # experts, of what has a matrix for each of them

    def of(self, answer: Mapping[str, Array]) -> dict[str, Array]:
        """Take that part of an answer, as float32; names with _lora_ are of what each expert has."""
        which = {name: self.experts if "_lora_" in name else self.rows for name in answer}
        return {name: value[which[name]].astype(np.float32) for name, value in answer.items()}


def activate(name: str, gate: Array, up: Array) -> Array:
    """Apply an activation, named as in the library, none of whose code the reference may share."""
    if name == "silu":
        silu: Array = gate / (1 + np.exp(-gate)) * up
        return silu
    if name == "swigluoai":
        gate, up = np.minimum(gate, np.float32(7)), np.clip(up, np.float32(-7), np.float32(7))
        swigluoai: Array = gate / (1 + np.exp(np.float32(-1.702) * gate)) * (up + 1)
        return swigluoai
    raise ValueError(f"activation {name!r}: the reference of the benches does not have it")


def expert_output(
    layer: Layer, e: int, x: Array, weights: tuple[Array, Array, Array], activation_block: int = 0
) -> Array:
    """One expert on rows `x`, with its matrices in float32.

    With an `activation_block`, what enters a product is rounded to int8 in blocks of that many columns.
    """
    x = to_int8_and_back(x, activation_block)
    gate, up = x @ weights[0].T, x @ weights[1].T
    if layer.gate_bias is not None and layer.up_bias is not None:
        gate, up = gate + layer.gate_bias[e], up + layer.up_bias[e]
    hidden = to_int8_and_back(activate(layer.shape.activation, gate, up), activation_block)
    y: Array = hidden @ weights[2].T
    return y if layer.down_bias is None else y + layer.down_bias[e]


def to_int8_and_back(x: Array, block: int) -> Array:
    """Round each block of a row, in bf16, to integers up to 127 times its scale; 0 rounds nothing."""
    if block == 0:
        return x
    x = to_float32(x.astype(bfloat16))
    rounded = np.empty_like(x)
    for begin in range(0, x.shape[1], block):
        part = x[:, begin : begin + block]
        scale = np.abs(part).max(axis=1, keepdims=True) / np.float32(127)
        rounded[:, begin : begin + block] = np.rint(part / np.where(scale == 0, 1, scale)) * scale
    return rounded


def sample_rows(layer: Layer, case: Case) -> Sample:
    """Sample the output of a forward pass."""
    return Sample(choose_rows(layer, case, layer.shape.flop(1)), np.arange(0))


def choose_rows(layer: Layer, case: Case, flop: float) -> Array:
    """Rows to check: all of them, or as many as the reference may cost (`flop` for each), spread evenly."""
    shape, tokens = layer.shape, len(case.ids)
    most = max(1, min(tokens, int(_MAX_FLOP / flop)))
    while True:
        rows = np.unique(np.linspace(0, tokens - 1, most).astype(int))
        touched = len(np.unique(case.ids[rows]))
        if most == 1 or touched * shape.weights_per_expert <= _MAX_WEIGHTS:
            return rows
        most = max(1, most * 3 // 4)


def reference_answer(layer: Layer, case: Case, sample: Sample, activation_block: int = 0) -> dict[str, Array]:
    """Compute the layer's output y for the sampled rows, float32 [len(rows), H]; see `expert_output`."""
    rows = sample.rows
    x, ids, routing = to_float32(case.x[rows]), case.ids[rows], case.weights[rows]
    out = np.zeros_like(x)
    for e in np.unique(ids):
        t, p = np.nonzero(ids == e)
        matrices = (to_float32(layer.gate[e]), to_float32(layer.up[e]), to_float32(layer.down[e]))
        y = expert_output(layer, int(e), x[t], matrices, activation_block)
        out[t] += y * routing[t, p, None]
    return {"y": out}


def relative_error(got: Array, expected: Array) -> float:
    """||got - expected|| / ||expected||; infinite when an element is not finite."""
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
