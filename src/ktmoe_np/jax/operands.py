"""The arguments of calls, checked while a program is traced, and the numbers of layers in programs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import kt_kernel_ext as ext
from ..arrays.spec import ArraySpec
from ..arrays.types import bfloat16
from ..config import ActivationDtype, MoEConfig
from ..inference.base import BaseMoEWrapper
from ..layers.base import MoELayer
from ..sft.base import BaseSFTMoEWrapper
from ..sft.numbered import ADAPTER_DTYPES

__all__ = ["Array", "adapter", "called", "check_no_index", "checked"]

#: A JAX array, or a tracer.
Array = Any

#: What a call of a layer has fixed: its mask, as bytes, and what products take activations in.
_Fixed = tuple[bytes | None, str | None]

#: wrapper -> what is fixed -> the number under which programs call the layer so.
_numbers: weakref.WeakKeyDictionary[MoELayer, dict[_Fixed, int]] = weakref.WeakKeyDictionary()
_lock = ext.CallLock("layers")

_FLOAT32 = (np.dtype(np.float32),)
_INTEGERS = tuple(np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))


def _number_of(layer: MoELayer, activation_dtype: ActivationDtype | None) -> int:
    """The number under which programs call a layer with its current mask and these activations."""
    mask, dtype = layer.gpu_experts_mask, layer._dtype_of_call(activation_dtype)
    key = None if mask is None else mask.tobytes(), dtype
    with _lock:
        known = _numbers.setdefault(layer, {})
        if key not in known:
            sizes = (0, 0)
            if isinstance(layer, BaseMoEWrapper):
                sizes = layer.max_deferred_experts_per_token, layer._runner.chunk_size
            known[key] = int(ext.xla.add_layer(layer.cpu_infer, layer._layer, mask, *sizes, dtype))
            weakref.finalize(layer, ext.xla.remove_layer, known[key])
        return known[key]


def called(
    layers: Any, index: Any, activation_dtype: ActivationDtype | None, kind: type[Any], name: str
) -> tuple[Array, MoEConfig]:
    """The number of the layer that is to be called, and the sizes."""
    several = not isinstance(layers, MoELayer)
    each = list(layers) if several else [layers]
    for layer in each:
        if not isinstance(layer, kind):
            expected = f"a {kind.__name__}, of mode {'sft' if kind is BaseSFTMoEWrapper else 'inference'!r}"
            raise TypeError(f"{name}: got {type(layer).__name__}, expected {expected}")
        if not layer.loaded:
            raise RuntimeError(f"{name}: layer {layer.layer_idx} has no weights yet")
        layer._files.check()
    sizes = {(_sizes(layer), getattr(layer, "options", None)) for layer in each}
    if len(sizes) != 1:
        raise ValueError(f"{name}: got {len(sizes)} kinds of layers, expected one or more of the same sizes")
    if several == (index is None):
        raise ValueError(f"index: got {index!r}, expected {'an integer' if several else 'None'}")
    numbers = np.array([_number_of(layer, activation_dtype) for layer in each], np.int32)
    number = jnp.asarray(numbers)[index] if several else jnp.asarray(numbers[0])
    if number.ndim:
        raise ValueError(f"index: got shape {list(number.shape)}, expected a single integer")
    return number, each[0].config


def check_no_index(index: object) -> None:
    """Raise ValueError for an index without a sequence of layers."""
    if index is not None:
        raise ValueError(f"index: got {index!r}, expected None")


def _sizes(layer: MoELayer) -> MoEConfig:
    """What layers that are called by index have in common: all but their numbers."""
    return replace(layer.config, layer_idx=0)


def checked(config: MoEConfig, x: Any, ids: Any, weights: Any) -> tuple[Array, Array, Array]:
    """Hidden states, ids and weights as JAX arrays; TypeError and ValueError when they do not fit."""
    x, ids, weights = jnp.asarray(x), _ids(ids, config.num_experts), jnp.asarray(weights)
    ArraySpec((bfloat16,), ("...", config.hidden_size)).check("hidden_states", x)
    routes = (*x.shape[:-1], config.num_experts_per_tok)
    ArraySpec(_INTEGERS, routes, "integers").check("topk_ids", ids)
    ArraySpec(_FLOAT32, routes).check("topk_weights", weights)
    return x, ids, weights


def _ids(ids: Any, num_experts: int) -> Array:
    """Ids in 32 or 64 bits; those that have no place there become E, which is as wrong."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":  # before JAX takes the upper half away
        ids = np.clip(ids, -1 if ids.dtype.kind == "i" else 0, num_experts)
    ids = jnp.asarray(ids)
    if jnp.issubdtype(ids.dtype, jnp.unsignedinteger) and ids.dtype.itemsize >= 4:
        ids = jnp.minimum(ids, num_experts)
    is_wide = ids.dtype == jnp.int64 or not jnp.issubdtype(ids.dtype, jnp.integer)
    return ids if is_wide else ids.astype(jnp.int32)


def adapter(lora: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Array:
    """The adapter of that name as a JAX array; TypeError and ValueError when it does not fit."""
    value = jnp.asarray(lora[name])
    ArraySpec(ADAPTER_DTYPES, shape).check(name, value)
    return value
