"""Layers with quantized weights, and their specification by plain loops over rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from reference_cases import AnyArray, Layer, draw_layer, experts_loop, round_by_bits

from ktmoe_np.reference import Int4Matrix, Int8GroupMatrix, Int8Matrix, quantize_int4, quantize_int8

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
#: Ways to quantize a matrix, and the products that they allow.
METHODS: dict[str, tuple[Callable[[AnyArray], Any], str]] = {
    "int8": (quantize_int8, "int8"),
    "int4": (quantize_int4, "int8"),
    "int4, 128": (lambda w: quantize_int4(w, group_size=128), "int8"),
    "weight-only int8": (quantize_int8, "bfloat16"),
    "weight-only int8, 32": (lambda w: quantize_int8(w, group_size=32), "bfloat16"),
    "weight-only int4": (quantize_int4, "bfloat16"),
}


def quantized(layer: Layer, method: str) -> Layer:
    """The layer with its weights quantized."""
    quantize, product = METHODS[method]
    matrices = {name: None if layer[name] is None else quantize(layer[name]) for name in PROJECTIONS}
    return {**layer, **matrices, "product": product}


def draw_quantized(seed: int, method: str, **sizes: Any) -> Layer:
    """Random arguments of `moe_forward`; the sizes are those of `draw_layer`."""
    return quantized(draw_layer(seed, **sizes), method)


def decoded(matrix: Any, e: int, n: int) -> tuple[list[float], float]:
    """Row n of expert e one number at a time: what activations are multiplied with, and the channel scale."""
    num_columns = matrix.shape[-1]
    match matrix:
        case Int8Matrix():
            return [float(c) for c in matrix.codes[e, n]], float(matrix.channel_scale[e, n])
        case Int4Matrix():
            g, row = matrix.group_size, (e, n)
            codes = [
                int(matrix.q[*row, k]) * int(matrix.multiplier[*row, k // g]) for k in range(num_columns)
            ]
            return [float(c) for c in codes], float(matrix.channel_scale[row])
        case Int8GroupMatrix():
            scales = [matrix.group_scale[e, n, k // matrix.group_size] for k in range(num_columns)]
            codes = matrix.codes[e, n].astype(np.float32)
            return [round_by_bits(float(c * s)) for c, s in zip(codes, scales, strict=True)], 1.0
    raise TypeError(type(matrix))


def activation_codes(x: list[float]) -> tuple[list[float], float]:
    """A row of activations as int8 codes and their scale."""
    scale = np.float32(max(abs(v) for v in x)) / np.float32(127)
    if scale == 0:
        return [0.0] * len(x), 0.0
    return [float(np.rint(np.float32(v) / scale)) for v in x], float(scale)


def quantized_loop(layer: Layer, formula: Callable[[float, float], float]) -> AnyArray:
    """The specification in Python's own floats, one token at a time, before the last rounding."""

    def project(x: list[float], name: str, e: int) -> list[float]:
        operand, scale = activation_codes(x) if layer["product"] == "int8" else (x, 1.0)
        matrix, bias = layer[f"{name}_proj"], layer.get(f"{name}_bias")
        result = []
        for n in range(matrix.shape[1]):
            weights, channel_scale = decoded(matrix, e, n)
            total = sum(a * w for a, w in zip(operand, weights, strict=True)) * scale * channel_scale
            result.append(total + (0.0 if bias is None else float(bias[e, n])))
        return result

    return experts_loop(layer, formula, project)
