"""What the tests share that run the engine beside the model code of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from layers import Batch, bf16

from ktmoe_np.reference import activate

__all__ = ["COMMON", "LAYERS", "TOKENS", "Call", "recorded", "rounding_of_the_intermediate"]

AnyArray = Any

LAYERS, TOKENS = 2, 23

COMMON = {
    "hidden_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "num_experts_per_tok": 2,
}


@dataclass
class Call:
    """What went into the experts of a layer, and what the model made of it."""

    batch: Batch
    output: AnyArray


def recorded(module: Any) -> Iterator[Call]:
    """Record the calls of a model's module of experts; its input is rounded to bfloat16."""
    calls: list[Call] = []

    def rounded(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].bfloat16().float(), *args[1:])

    def record(_: Any, args: tuple[Any, ...], output: Any) -> None:
        x, ids, weights = (tensor.reshape(TOKENS, -1).numpy() for tensor in args[:3])
        batch = Batch(x.astype(bf16), ids, weights.astype(np.float32))
        calls.append(Call(batch, output.reshape(TOKENS, -1).numpy()))

    module.register_forward_pre_hook(rounded)
    module.register_forward_hook(record)
    return iter(calls)


def rounding_of_the_intermediate(experts: Any, batch: Batch, activation: Any) -> AnyArray:
    """How far the rounding of h, which the model does not do, may take a row.

    To nearest, with 8 bits: 2^-8 of each element at most, then through |Wd| and the routing weights.
    """
    total = np.zeros(batch.x.shape)
    for t, p in np.ndindex(*batch.ids.shape):
        e, x = batch.ids[t, p], batch.x[t].astype(np.float64)
        gate, up = (
            x @ weight[e].astype(np.float64).T + (0 if bias is None else bias[e].astype(np.float64))
            for weight, bias in ((p.codes, p.bias) for p in (experts.gate, experts.up))
        )
        h = np.abs(activate(activation, gate, up))
        total[t] += abs(float(batch.weights[t, p])) * (np.abs(experts.down.codes[e].astype(np.float64)) @ h)
    return total * 2.0**-8
