"""Layers to train, for the tests of the reference."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
from reference_cases import AnyArray, Layer, bf16, draw_layer

from ktmoe_np.reference import Gradients, LoraWeights, moe_backward, moe_forward_sft

#: Names of `Gradients` and of the arguments that they are the gradients of.
ARGUMENTS = {
    "grad_input": "hidden_states",
    "grad_weights": "topk_weights",
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
}
LORA_NAMES = tuple(field.name for field in fields(LoraWeights) if field.name != "lora_alpha")


def draw_training(
    seed: int, *, R: int = 3, lora_alpha: float = 5.0, dtype: Any = bf16, **sizes: Any
) -> tuple[Layer, AnyArray]:
    """Random arguments of `moe_forward_sft`, and of `moe_backward`; the sizes are those of `draw_layer`."""
    layer = draw_layer(seed, **sizes)
    rng = np.random.default_rng(seed + 1)
    num_experts, hidden, inter = layer["down_proj"].shape

    def draw(*shape: int) -> AnyArray:
        scaled = rng.standard_normal(shape) / math.sqrt(shape[-1] or 1)
        return scaled.astype(np.float32).astype(bf16).astype(dtype)

    matrices: dict[str, Any] = {
        "gate_lora_a": draw(num_experts, R, hidden),
        "gate_lora_b": draw(num_experts, inter, R),
        "up_lora_a": draw(num_experts, R, hidden),
        "up_lora_b": draw(num_experts, inter, R),
        "down_lora_a": draw(num_experts, R, inter),
        "down_lora_b": draw(num_experts, hidden, R),
    }
    if layer["up_proj"] is None:
        matrices |= {"up_lora_a": None, "up_lora_b": None}
    layer["lora"] = LoraWeights(**matrices, lora_alpha=lora_alpha)
    grad_output = rng.standard_normal(layer["hidden_states"].shape).astype(np.float32).astype(bf16)
    return layer, grad_output


def train(layer: Layer, grad_output: AnyArray, *, full: bool = True, **options: Any) -> Gradients:
    """Run forward and backward."""
    return moe_backward(moe_forward_sft(**layer, **options)[1], grad_output, full_weight_grad=full)


def present(gradients: Gradients) -> dict[str, AnyArray]:
    """The gradients that there are, by name."""
    every = {field.name: getattr(gradients, field.name) for field in fields(gradients)}
    return {name: value for name, value in every.items() if value is not None}


def philox_word(seed: int, step: int, layer: int, token: int, feature: int, which: int) -> int:
    """The random word of one element, in Python's integers."""
    low = 0xFFFFFFFF
    k0, k1 = seed & low, seed >> 32
    c = [feature // 4, token, step, 2 * layer + which]
    for _ in range(10):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(right >> 32) ^ c[1] ^ k0, right & low, (left >> 32) ^ c[3] ^ k1, left & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c[feature % 4]
