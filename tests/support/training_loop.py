"""Forward and backward of the specification one number at a time, in Python's own floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from quantized_cases import activation_codes, decoded
from reference_cases import FORMULAS, AnyArray, Layer, sigmoid
from reference_cases import round_by_bits as bf
from training_cases import LORA_NAMES, philox_word

from ktmoe_np.reference import dequantize

#: d act / dg and d act / du.
SLOPES: dict[str, tuple[Callable[[float, float], float], ...]] = {
    "silu": (lambda g, u: sigmoid(g) * (1 + g * sigmoid(-g)) * u, lambda g, u: g * sigmoid(g)),
    "relu2": (lambda g, u: 2 * max(g, 0.0),),
}


class Loop:
    """One training step of a layer; `out` and the gradients are as they are before their last rounding."""

    def __init__(self, layer: Layer, grad_output: AnyArray, *, float32_cache: bool) -> None:
        lora, self.dropout = layer["lora"], layer.get("dropout")
        matrices = {name: getattr(lora, name) for name in LORA_NAMES}
        matrices |= {name: layer[name] for name in ("gate_proj", "up_proj", "down_proj")}
        self.quantized = {
            k: v for k, v in matrices.items() if v is not None and not isinstance(v, np.ndarray)
        }
        matrices |= {name: dequantize(matrix) for name, matrix in self.quantized.items()}
        self.codes = activation_codes if layer.get("product") == "int8" else lambda x: (x, 1.0)
        self.weights = {k: rounded(v.astype(float)) for k, v in matrices.items() if v is not None}
        self.biases = {k: layer[k].astype(float) for k in layer if k.endswith("_bias")}
        self.projections = ("gate", "up") if "up_proj" in self.weights else ("gate",)
        self.act, self.slopes = FORMULAS[layer["activation"]][1], SLOPES[layer["activation"]]
        rate = self.dropout.rate if self.dropout else 0.0
        self.s = float(np.float32(lora.lora_alpha / lora.gate_lora_a.shape[1] / (1 - rate)))
        self.scale_inputs = layer.get("scale_inputs", False)
        self.float32_cache = float32_cache
        self.x, self.q = layer["hidden_states"].astype(float), grad_output.astype(float)
        self.routing = layer["topk_weights"].astype(float)
        self.out = np.zeros(self.x.shape)
        trained = self.weights.keys() - self.quantized.keys()
        self.gradients = {name: np.zeros(self.weights[name].shape) for name in trained}
        self.gradients |= {"grad_input": np.zeros(self.x.shape), "grad_weights": np.zeros(self.routing.shape)}
        mask = layer.get("gpu_experts_mask")
        for (t, p), e in np.ndenumerate(layer["topk_ids"]):
            if e >= 0 and not (mask is not None and mask[e]):
                self.slot(t, p, e)

    def kept(self, t: int, size: int, which: int) -> AnyArray:
        """The dropout mask of a token as 0 and 1."""
        d = self.dropout
        if d is None:
            return np.ones(size)
        words = [philox_word(d.seed, d.step, d.layer, t, f, which) for f in range(size)]
        return np.array([float(word >= math.floor(d.rate * 2**32)) for word in words])

    def slot(self, t: int, p: int, e: int) -> None:
        at = {name: value[e] for name, value in self.weights.items()}
        bias = {name: value[e] for name, value in self.biases.items()}
        x, q, w, s = self.x[t], self.q[t], self.routing[t, p], self.s
        if self.scale_inputs:
            x, w = rounded(w * x), 1.0
        kept_x, kept_h = self.kept(t, x.size, 0), self.kept(t, at["down_lora_a"].shape[1], 1)
        lora_hidden, first = {}, []
        for name in self.projections:
            lora_hidden[name] = rounded(product(at[f"{name}_lora_a"], x * kept_x))
            base = self.base(f"{name}_proj", e, x) + bias.get(f"{name}_bias", 0.0)
            first.append(base + s * product(at[f"{name}_lora_b"], lora_hidden[name]))
        h = np.array([bf(self.act(*operands)) for operands in zip(first[0], first[-1], strict=True)])
        lora_hidden["down"] = rounded(product(at["down_lora_a"], h * kept_h))
        y = self.base("down_proj", e, h) + s * product(at["down_lora_b"], lora_hidden["down"])
        self.out[t] += w * (y + bias.get("down_bias", 0.0))

        cached = first if self.float32_cache else [rounded(values) for values in first]
        r = rounded(product(at["down_lora_b"].T, q))
        z = product(at["down_proj"].T, q) + s * product(at["down_lora_a"].T, r) * kept_h
        self.gradients["grad_weights"][t, p] = z @ h + q @ bias.get("down_bias", np.zeros(q.size))
        self.add("down_lora_b", e, s * q, rounded(w * lora_hidden["down"]))
        self.add("down_lora_a", e, rounded(s * w * r), h * kept_h)
        self.add("down_proj", e, q, rounded(w * h))
        grad_x = np.zeros(x.size)
        for name, slope in zip(self.projections, self.slopes, strict=True):
            act_slope = [slope(*operands) for operands in zip(cached[0], cached[-1], strict=True)]
            d = rounded(w * z * np.array(act_slope))
            d_inner = rounded(s * product(at[f"{name}_lora_b"].T, d))
            grad_x += product(at[f"{name}_proj"].T, d) + product(at[f"{name}_lora_a"].T, d_inner) * kept_x
            self.add(f"{name}_lora_b", e, s * d, lora_hidden[name])
            self.add(f"{name}_lora_a", e, d_inner, x * kept_x)
            self.add(f"{name}_proj", e, d, x)
        if self.scale_inputs:
            self.gradients["grad_weights"][t, p] = grad_x @ self.x[t]
            grad_x = self.routing[t, p] * grad_x
        self.gradients["grad_input"][t] += grad_x

    def base(self, name: str, e: int, x: AnyArray) -> AnyArray:
        """The product of x with the base weights."""
        if name not in self.quantized:
            return product(self.weights[name][e], x)
        operand, scale = self.codes([float(value) for value in x])
        rows = [decoded(self.quantized[name], e, n) for n in range(self.weights[name].shape[1])]
        return product(np.array([values for values, _ in rows]), operand) * scale * [row[1] for row in rows]

    def add(self, name: str, e: int, left: AnyArray, right: AnyArray) -> None:
        if name in self.gradients:
            self.gradients[name][e] += np.outer(left, right)


def rounded(values: AnyArray) -> AnyArray:
    """bf of each."""
    result: AnyArray = np.vectorize(bf, otypes=[float])(values) if values.size else values
    return result


def product(matrix: AnyArray, x: Any) -> AnyArray:
    """matrix . x, each row summed without an error."""
    return np.array([math.fsum(a * b for a, b in zip(row, x, strict=True)) for row in matrix])
