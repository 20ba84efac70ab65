"""Layers for the tests of the reference, and the specification one number at a time."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ktmoe_np.config import parse_activation

AnyArray = NDArray[Any]
Layer = dict[str, Any]
bf16 = ml_dtypes.bfloat16


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700 else 0.0


#: The formulas of the specification, one number at a time; L = 1.5 where there is a limit.
FORMULAS: dict[str, tuple[Any, Callable[[float, float], float]]] = {
    "silu": ("silu", lambda g, u: g * sigmoid(g) * u),
    "silu, limit": (
        {"kind": "silu", "limit": 1.5},
        lambda g, u: min(g, 1.5) * sigmoid(min(g, 1.5)) * max(-1.5, min(u, 1.5)),
    ),
    "swigluoai": (
        {"kind": "swigluoai", "limit": 1.5},
        lambda g, u: min(g, 1.5) * sigmoid(1.702 * min(g, 1.5)) * (max(-1.5, min(u, 1.5)) + 1),
    ),
    "swiglustep": (
        {"kind": "swiglustep", "limit": 1.5},
        lambda g, u: min(g * sigmoid(g), 1.5) * max(-1.5, min(u, 1.5)),
    ),
    "gelu": ("gelu", lambda g, u: g * math.erfc(-g / math.sqrt(2)) / 2 * u),
    "gelu_tanh": (
        "gelu_tanh",
        lambda g, u: g / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u,
    ),
    "situ": ("situ", lambda g, u: 4 * math.tanh(g / 4) * sigmoid(g) * 25 * math.tanh(u / 25)),
    "relu2": ("relu2", lambda g, u: max(g, 0.0) ** 2),
    "silu_ungated": ("silu_ungated", lambda g, u: g * sigmoid(g)),
    "gelu_tanh_ungated": (
        "gelu_tanh_ungated",
        lambda g, u: g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2,
    ),
}


def round_by_bits(x: float) -> float:
    """Round to bfloat16 on the bits of a float32, to nearest even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    (rounded,) = struct.unpack("<f", struct.pack("<I", bits))
    return float(rounded)


def draw_layer(
    seed: int,
    *,
    T: int = 5,
    E: int = 4,
    P: int = 2,
    H: int = 48,
    inter: int = 40,
    activation: Any = "silu",
    biases: bool = False,
) -> Layer:
    """Random arguments of `moe_forward`; ids from -1 up, duplicates among them."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> AnyArray:
        return rng.standard_normal(shape).astype(np.float32).astype(bf16)

    gated = parse_activation(activation).gated
    layer: Layer = {
        "hidden_states": draw(T, H),
        "topk_ids": rng.integers(-1, E, (T, P)),
        "topk_weights": rng.random((T, P), np.float32),
        "gate_proj": (draw(E, inter, H) * bf16(0.25)).astype(bf16),
        "up_proj": draw(E, inter, H) if gated else None,
        "down_proj": draw(E, H, inter),
        "activation": activation,
    }
    if biases:
        layer |= {"gate_bias": draw(E, inter), "down_bias": rng.standard_normal((E, H)).astype(np.float32)}
        layer |= {"up_bias": draw(E, inter)} if gated else {}
    return layer


def entering(layer: Layer, t: int, p: int) -> tuple[list[float], float]:
    """What enters the expert of a slot, and what its output counts."""
    x, w = [float(v) for v in layer["hidden_states"][t]], float(layer["topk_weights"][t, p])
    return ([round_by_bits(w * v) for v in x], 1.0) if layer.get("scale_inputs") else (x, w)


def experts_loop(
    layer: Layer,
    formula: Callable[[float, float], float],
    project: Callable[[list[float], str, int], list[float]],
) -> AnyArray:
    """The sum of the experts, a token at a time; `project` multiplies a row by a projection of an expert."""
    out = np.zeros(layer["hidden_states"].shape)
    for (t, p), e in np.ndenumerate(layer["topk_ids"]):
        if e >= 0:
            x, w = entering(layer, t, p)
            gate = project(x, "gate", e)
            up = project(x, "up", e) if layer["up_proj"] is not None else [0.0] * len(gate)
            h = [round_by_bits(formula(g, u)) for g, u in zip(gate, up, strict=True)]
            out[t] += w * np.array(project(h, "down", e))
    return out


def loop(layer: Layer, formula: Callable[[float, float], float]) -> AnyArray:
    """The specification one number at a time, in Python's own floats, before the last rounding."""
    x, ids = layer["hidden_states"], layer["topk_ids"]
    base, mask, order = (layer.get(name) for name in ("base", "gpu_experts_mask", "physical_to_logical_map"))
    out = np.zeros(x.shape)

    def dot(a: Any, b: Any, bias: Any, *at: int) -> float:
        total = sum(float(p) * float(q) for p, q in zip(a, b, strict=True))
        return total + (0.0 if bias is None else float(bias[at]))

    for t in range(x.shape[0]):
        for p in range(ids.shape[1]):
            e = int(ids[t, p])
            if e < 0 or (mask is not None and mask[e]):
                continue
            e = e if order is None else int(order[e])
            row, w = entering(layer, t, p)
            gate, up, down = layer["gate_proj"][e], layer["up_proj"], layer["down_proj"][e]
            h = []
            for i in range(len(gate)):
                g = dot(row, gate[i], layer.get("gate_bias"), e, i)
                u = 0.0 if up is None else dot(row, up[e][i], layer.get("up_bias"), e, i)
                h.append(round_by_bits(formula(g, u)))
            for n in range(x.shape[1]):
                out[t, n] += w * dot(h, down[n], layer.get("down_bias"), e, n)
    return out if base is None else out + base.astype(np.float64)


def bits(array: AnyArray) -> AnyArray:
    return array.view(np.uint16)
