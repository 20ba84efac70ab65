"""A transformer block in plain JAX whose experts are a layer of this library, and its training by optax.

Attention, router, embedding and the experts' adapters learn; the experts' own weights stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCABULARY, HIDDEN, HEADS, PER_TOKEN = 16, 32, 2, 2

#: What stands for the experts: (adapters, rows, ids, weights) to rows, bfloat16 [..., H].
Experts = Callable[[Any, Any, Any, Any], Any]


def first_parameters(lora: Any, num_experts: int) -> dict[str, Any]:
    """Draw the block's parameters; `lora` are the adapters."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {
        "embedding": (VOCABULARY, HIDDEN),
        "attention": (HIDDEN, 3 * HIDDEN),
        "output": (HIDDEN, HIDDEN),
        "router": (HIDDEN, num_experts),
    }
    drawn = zip(shapes.items(), keys, strict=True)
    return {name: jax.random.normal(key, shape) * shape[0] ** -0.5 for (name, shape), key in drawn} | {
        "lora": lora
    }


def normed(x: Any) -> Any:
    """Divide by the root of the mean square."""
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def attention(parameters: Any, x: Any) -> Any:
    """Causal self-attention of [B, T, H]."""
    heads = (*x.shape[:-1], HEADS, HIDDEN // HEADS)
    query, key, value = (part.reshape(heads) for part in jnp.split(x @ parameters["attention"], 3, axis=-1))
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return mixed.reshape(x.shape) @ parameters["output"]


def block(parameters: Any, tokens: Any, experts: Experts) -> Any:
    """Logits [B, T, vocabulary] of what follows each of the tokens [B, T]."""
    x = parameters["embedding"][tokens]
    x = x + attention(parameters, normed(x))
    rows = normed(x)
    chances, ids = jax.lax.top_k(jax.nn.softmax(rows @ parameters["router"]), PER_TOKEN)
    weights = chances / chances.sum(-1, keepdims=True)
    x = x + experts(parameters["lora"], rows.astype(jnp.bfloat16), ids, weights).astype(jnp.float32)
    return normed(x) @ parameters["embedding"].T


def train(parameters: Any, experts: Experts, steps: int) -> list[float]:
    """Learn which token follows each; the loss of every step."""
    optimizer = optax.adam(4e-3)

    @jax.jit
    def step(parameters: Any, state: Any, tokens: Any) -> Any:
        def loss(parameters: Any) -> Any:
            logits = block(parameters, tokens[:, :-1], experts)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, value

    follows = np.random.default_rng(0).permutation(VOCABULARY)
    state, losses = optimizer.init(parameters), []
    for i in range(steps):
        tokens = [np.random.default_rng(i).integers(0, VOCABULARY, 8)]
        for _ in range(15):
            tokens.append(follows[tokens[-1]])
        parameters, state, value = step(parameters, state, jnp.asarray(np.stack(tokens, 1), jnp.int32))
        losses.append(float(value))
    return losses
