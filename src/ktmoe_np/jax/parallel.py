"""Layers on several ranks in programs: ordered callbacks, since every call is an exchange of all ranks.

XLA may run independent calls in any order, and in another one on each rank. These have the order of the
program, as each waits for the one before: JAX threads a token through them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from ..config import ActivationDtype
from ..distributed.expert_parallel import ExpertParallel
from ..distributed.expert_parallel_sft import ExpertParallelSFT
from ..sft.gradients import lora_shapes
from ..sft.numbered import check_lora
from .operands import Array, adapter, checked

__all__ = ["parallel_forward", "parallel_sft"]


class _Called(NamedTuple):
    """A layer, and what its calls have fixed."""

    layer: Any
    activation_dtype: Any  #: a name, or None for the layer's own


def parallel_forward(
    moe: ExpertParallel, x: Array, ids: Array, weights: Array, activation_dtype: ActivationDtype | None
) -> Array:
    """See `moe_forward`."""
    called = _Called(moe, moe.layer._dtype_of_call(activation_dtype))
    return _forward(called, *checked(moe.config, x, ids, weights))


def parallel_sft(
    sft: ExpertParallelSFT,
    lora: Mapping[str, Array],
    x: Array,
    ids: Array,
    weights: Array,
    activation_dtype: ActivationDtype | None,
) -> Array:
    """See `moe_sft`: `lora` is of this rank's experts."""
    options, config = sft.options, sft.layer.config
    check_lora(lora, config, options.lora_rank, options.lora_dropout, "a JAX program")
    shapes = lora_shapes(config, options.lora_rank)
    adapters = tuple(adapter(lora, name, shape) for name, shape in shapes.items())
    called = _Called(sft, sft.layer._dtype_of_call(activation_dtype))
    return _sft(called, adapters, *checked(sft.config, x, ids, weights))


def _like(x: Array, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype if dtype is None else dtype)


def _arrays(values: Sequence[Array]) -> list[np.ndarray[Any, Any]]:
    """What a callback gets, as NumPy arrays without a copy."""
    return [np.asarray(value) for value in values]


# ---- inference ----


def _forward(called: _Called, x: Array, ids: Array, weights: Array) -> Array:
    @jax.custom_vjp
    def call(x: Array, ids: Array, weights: Array) -> Array:
        def run(*batch: Array) -> Any:
            return called.layer.forward(*_arrays(batch), activation_dtype=called.activation_dtype)

        return io_callback(run, _like(x), x, ids, weights, ordered=True)

    def forward(*batch: Array) -> tuple[Array, None]:
        return call(*batch), None

    def backward(_: None, __: Array) -> Any:
        raise TypeError("moe_forward: has no derivative; moe_sft has, with a layer of mode 'sft'")

    call.defvjp(forward, backward)
    return call(x, ids, weights)


# ---- training ----


def _sft(called: _Called, lora: tuple[Array, ...], x: Array, ids: Array, weights: Array) -> Array:
    layer: ExpertParallelSFT = called.layer
    names = tuple(lora_shapes(layer.layer.config, layer.options.lora_rank))

    def give(adapters: Sequence[Array]) -> None:
        if adapters:
            layer.update_lora_weights(**dict(zip(names, _arrays(adapters), strict=True)))

    def forward_on_ranks(x: Array, ids: Array, weights: Array, *adapters: Array) -> Any:
        give(adapters)
        return step(x, ids, weights, save=False)

    def backward_on_ranks(x: Array, ids: Array, weights: Array, grad: Array, *adapters: Array) -> Any:
        """Compute the forward pass again: what a program keeps is arrays, not the state of a layer."""
        give(adapters)
        step(x, ids, weights, save=True)
        found = layer.backward(np.asarray(grad))
        return (found.grad_input, found.grad_weights, *(found.matrices[name] for name in names))

    def step(x: Array, ids: Array, weights: Array, save: bool) -> Any:
        x, ids, weights = _arrays((x, ids, weights))
        return layer.forward_sft(x, ids, weights, save, activation_dtype=called.activation_dtype)

    @jax.custom_vjp
    def call(lora: tuple[Array, ...], x: Array, ids: Array, weights: Array) -> Array:
        return io_callback(forward_on_ranks, _like(x), x, ids, weights, *lora, ordered=True)

    def forward(lora: tuple[Array, ...], x: Array, ids: Array, weights: Array) -> tuple[Array, Any]:
        return call(lora, x, ids, weights), (lora, x, ids, weights)

    def backward(kept: Any, grad: Array) -> tuple[Any, ...]:
        lora, x, ids, weights = kept
        results = (_like(x), _like(weights), *(_like(each, np.float32) for each in lora))
        grad_x, grad_weights, *grad_lora = io_callback(
            backward_on_ranks, results, x, ids, weights, grad.astype(jnp.bfloat16), *lora, ordered=True
        )
        by_lora = tuple(found.astype(given.dtype) for found, given in zip(grad_lora, lora, strict=True))
        return by_lora, grad_x, None, grad_weights

    call.defvjp(forward, backward)
    return call(lora, x, ids, weights)
