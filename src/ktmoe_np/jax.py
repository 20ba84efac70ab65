"""Layers of experts in JAX programs on the CPU: under jit, grad, vmap, scan, checkpoint and shard_map.

XLA hands its buffers to the engine and takes its results without a copy. A call occupies the engine's threads
and the one that calls, never XLA's pool.

A program knows a layer by a number, which is an ordinary operand; so `jax.lax.scan` may go over layers. It
holds nothing of the layer else: the wrapper must live as long as programs that call it.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from . import kt_kernel_ext as ext
from .config import MoEConfig
from .inference.base import BaseMoEWrapper
from .layer import MoELayer
from .sft.base import BaseSFTMoEWrapper
from .sft.gradients import lora_shapes

__all__ = ["lora_parameters", "moe_forward", "moe_sft"]

#: An array of JAX, or what stands for one while a program is traced.
Array = Any

#: Operands whose leading axes count as rows, in all calls; the layer's number comes before them.
_ROWS = (1, 2, 3)


# ---- what users call ----


def moe_forward(
    moe: BaseMoEWrapper | Sequence[BaseMoEWrapper],
    hidden_states: Array,
    topk_ids: Array,
    topk_weights: Array,
    *,
    index: Array | None = None,
) -> Array:
    """The experts of a layer on a batch of tokens; as `BaseMoEWrapper.forward`, with its bits.

    Parameters
    ----------
    moe : BaseMoEWrapper, or a sequence of them
        Of mode ``inference``, loaded. Which experts its `gpu_experts_mask` names counts as it is when the
        program is traced. Of a sequence, all of the same sizes, `index` says which.
    hidden_states : array of bfloat16 [..., H]
        All leading axes count as rows, as does one of `jax.vmap`: a token's result does not depend on others.
    topk_ids : array of integers [..., P]
        Negative ids are skipped.
    topk_weights : array of float32 [..., P]
    index : integer, optional
        Which layer of a sequence; may be traced.

    Returns
    -------
    array of bfloat16 [..., H]

    Raises
    ------
    TypeError, ValueError
        While tracing: an argument of another kind, dtype or shape. Also when it is differentiated: that is
        what `moe_sft` is for.
    RuntimeError
        While tracing: nothing is loaded. From the running program, as JAX's error: the layer is gone, or an
        id of E or above.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> from ktmoe_np import KTMoEWrapper
    >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2")
    >>> first, last = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
    >>> moe.load_weights_from_tensors(first, None, last)
    >>> x = jnp.ones((3, 4), jnp.bfloat16)
    >>> ids, w = jnp.zeros((3, 1), int), jnp.ones((3, 1))
    >>> y = jax.jit(lambda *batch: moe_forward(moe, *batch))(x, ids, w)
    >>> y.shape, float(y[0, 0])
    ((3, 4), 32.0)
    """
    number, config = _called(moe, index, BaseMoEWrapper, "moe")
    return _forward(number, *_checked(config, hidden_states, topk_ids, topk_weights))


def moe_sft(
    sft: BaseSFTMoEWrapper | Sequence[BaseSFTMoEWrapper],
    lora: Mapping[str, Array],
    hidden_states: Array,
    topk_ids: Array,
    topk_weights: Array,
    *,
    index: Array | None = None,
) -> Array:
    """The experts of a layer with adapters, to be differentiated by these, the input and the routing weights.

    The layer's own adapters and saved passes become those of the last call: a layer that a program calls
    should be called by programs alone. A backward pass goes back through the forward pass that the layer has
    saved when that was its last one, and through a new one of the same bits otherwise.

    Parameters
    ----------
    sft : BaseSFTMoEWrapper, or a sequence of them
        Of mode ``sft``, loaded, without dropout.
    lora : mapping of str to array of float32 or bfloat16
        The adapters, under the names and in the shapes of `BaseSFTMoEWrapper.lora_weights`;
        `lora_parameters` gives first ones. Computed with as bfloat16.
    hidden_states, topk_ids, topk_weights, index
        See `moe_forward`.

    Returns
    -------
    array of bfloat16 [..., H]

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `moe_forward`; also for adapters that are missing, or a layer with dropout.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> from ktmoe_np import KTMoEWrapper
    >>> sft = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2", mode="sft",
    ...                    method="AMXBF16_SFT", lora_rank=1)
    >>> first, last = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
    >>> sft.load_weights_from_tensors(first, None, last)
    >>> x, ids, w = jnp.ones((3, 4), jnp.bfloat16), jnp.zeros((3, 1), int), jnp.ones((3, 1))
    >>> loss = lambda lora: moe_sft(sft, lora, x, ids, w).astype(jnp.float32).sum()
    >>> gradients = jax.grad(loss)(lora_parameters(sft))
    >>> sorted(gradients)
    ['down_lora_a', 'down_lora_b', 'gate_lora_a', 'gate_lora_b']
    """
    number, config = _called(sft, index, BaseSFTMoEWrapper, "sft")
    first = sft if isinstance(sft, BaseSFTMoEWrapper) else sft[0]
    options = first.options
    if options.lora_dropout:
        raise ValueError(f"sft: got lora_dropout {options.lora_dropout}, expected 0 in a program of JAX")
    shapes = lora_shapes(config, options.lora_rank)
    unknown = sorted(lora.keys() - shapes.keys())
    if unknown:
        raise ValueError(f"lora: got {unknown[0]!r}, expected {', '.join(shapes) or 'none'}")
    adapters = tuple(_adapter(lora, name, shape) for name, shape in shapes.items())
    return _sft(number, adapters, *_checked(config, hidden_states, topk_ids, topk_weights))


def lora_parameters(sft: BaseSFTMoEWrapper) -> dict[str, jax.Array]:
    """The adapters of a layer as arrays of JAX, by name; see `BaseSFTMoEWrapper.lora_weights`."""
    return {name: jnp.array(value) for name, value in sft.lora_weights.items()}


# ---- checks ----

#: wrapper -> mask, as bytes -> the number under which programs call the layer with it.
_numbers: weakref.WeakKeyDictionary[MoELayer, dict[bytes | None, int]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _number_of(layer: MoELayer) -> int:
    """The number under which programs call a layer with the mask that it has now."""
    mask = layer.gpu_experts_mask
    key = None if mask is None else mask.tobytes()
    with _lock:
        known = _numbers.setdefault(layer, {})
        if key not in known:
            known[key] = int(ext.xla.add_layer(layer.cpu_infer, layer._layer, mask))
            weakref.finalize(layer, ext.xla.remove_layer, known[key])
        return known[key]


def _called(layers: Any, index: Any, kind: type[Any], name: str) -> tuple[Array, MoEConfig]:
    """The number of the layer that is to be called, and the sizes."""
    several = not isinstance(layers, MoELayer)
    each = list(layers) if several else [layers]
    for layer in each:
        if not isinstance(layer, kind):
            expected = f"a {kind.__name__}, of mode {'sft' if kind is BaseSFTMoEWrapper else 'inference'!r}"
            raise TypeError(f"{name}: got {type(layer).__name__}, expected {expected}")
        if not layer.loaded:
            raise RuntimeError(f"{name}: layer {layer.layer_idx} has no weights yet")
    sizes = {(_sizes(layer), getattr(layer, "options", None)) for layer in each}
    if len(sizes) != 1:
        raise ValueError(f"{name}: got {len(sizes)} kinds of layers, expected one or more of the same sizes")
    if several == (index is None):
        raise ValueError(f"index: got {index!r}, expected {'an integer' if several else 'None'}")
    numbers = np.array([_number_of(layer) for layer in each], np.int32)
    number = jnp.asarray(numbers)[index] if several else jnp.asarray(numbers[0])
    if number.ndim:
        raise ValueError(f"index: got shape {list(number.shape)}, expected a single integer")
    return number, each[0].config


def _sizes(layer: MoELayer) -> tuple[Any, ...]:
    c = layer.config
    return c.num_experts, c.num_experts_per_tok, c.hidden_size, c.moe_intermediate_size, c.activation


def _checked(config: MoEConfig, x: Any, ids: Any, weights: Any) -> tuple[Array, Array, Array]:
    x, ids, weights = jnp.asarray(x), _ids(ids, config.num_experts), jnp.asarray(weights)
    if x.dtype != jnp.bfloat16:
        raise TypeError(f"hidden_states: got {_told(x)}, expected bfloat16 [..., {config.hidden_size}]")
    if x.ndim < 1 or x.shape[-1] != config.hidden_size:
        raise ValueError(f"hidden_states: got {_told(x)}, expected bfloat16 [..., {config.hidden_size}]")
    expected = [*x.shape[:-1], config.num_experts_per_tok]
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"topk_ids: got {_told(ids)}, expected integers {expected}")
    if weights.dtype != jnp.float32:
        raise TypeError(f"topk_weights: got {_told(weights)}, expected float32 {expected}")
    for name, value in (("topk_ids", ids), ("topk_weights", weights)):
        if list(value.shape) != expected:
            raise ValueError(f"{name}: got {_told(value)}, expected {expected}")
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


def _adapter(lora: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Array:
    if name not in lora:
        raise ValueError(f"lora: got no {name!r}, expected float32 or bfloat16 {list(shape)}")
    value = jnp.asarray(lora[name])
    if value.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"{name}: got {_told(value)}, expected float32 or bfloat16 {list(shape)}")
    if value.shape != shape:
        raise ValueError(f"{name}: got {_told(value)}, expected {list(shape)}")
    return value


def _told(x: Array) -> str:
    return f"{x.dtype} {list(x.shape)}"


# ---- derivatives ----


@jax.custom_vjp
def _forward(number: Array, x: Array, ids: Array, weights: Array) -> Array:
    return _forward_p.bind(number, x, ids, weights)[0]


def _forward_fwd(*operands: Array) -> tuple[Array, None]:
    return _forward(*operands), None


def _forward_bwd(_: None, __: Array) -> Any:
    raise TypeError("moe_forward: has no derivative; moe_sft has, with a layer of mode 'sft'")


_forward.defvjp(_forward_fwd, _forward_bwd)


#: A structure without arrays.
_WANTED: tuple[()] = ()


@jax.custom_vjp
def _sft(number: Array, lora: tuple[Array, ...], x: Array, ids: Array, weights: Array) -> Array:
    return _forward_sft_p.bind(number, x, ids, weights, *lora)[0]


def _sft_fwd(number: Any, lora: Any, x: Any, ids: Any, weights: Any) -> tuple[Array, Any]:
    operands = [each.value for each in (number, x, ids, weights, *lora)]
    # What is kept may be arrays and their structure: gradients of adapters are wanted where this is no None.
    wanted = _WANTED if any(each.perturbed for each in lora) else None
    out, number_of_pass = _forward_saved_p.bind(*operands)
    return out, (operands, number_of_pass, wanted)


def _sft_bwd(kept: Any, grad: Any) -> tuple[Any, ...]:
    (number, x, ids, weights, *lora), number_of_pass, wanted = kept
    if isinstance(grad, SymbolicZero):
        return None, None, None, None, None
    operands = number, x, ids, weights, *lora, number_of_pass, grad
    grad_x, grad_weights, *grad_lora = _backward_p.bind(*operands, with_lora=wanted is not None)
    by_lora = tuple(found.astype(given.dtype) for found, given in zip(grad_lora, lora, strict=False))
    return None, by_lora if wanted is not None else None, grad_x, None, grad_weights


_sft.defvjp(_sft_fwd, _sft_bwd, symbolic_zeros=True)


# ---- primitives ----


def _primitive(
    name: str, results: Callable[..., list[jax.core.ShapedArray]], batcher: Callable[..., Any]
) -> Primitive:
    """Make a primitive that is lowered to the handler of that name."""
    primitive = Primitive(f"ktmoe_{name}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(results)

    @functools.cache
    def compiled(**parameters: Any) -> Any:
        return jax.jit(functools.partial(primitive.bind, **parameters))

    primitive.def_impl(lambda *operands, **parameters: compiled(**parameters)(*operands))
    target = f"ktmoe_np.{name}"
    jax.ffi.register_ffi_target(target, ext.xla.handlers()[name], platform="cpu")

    def lower(context: Any, *operands: Any, **_: Any) -> Any:
        return jax.ffi.ffi_lowering(target)(context, *operands)

    def refuse(context: Any, *_: Any, **__: Any) -> Any:
        platforms = ", ".join(context.module_context.platforms)
        raise NotImplementedError(f"ktmoe_np.{name}: got a program for {platforms}, expected one for cpu")

    mlir.register_lowering(primitive, lower, platform="cpu")
    mlir.register_lowering(primitive, refuse)
    batching.primitive_batchers[primitive] = functools.partial(batcher, primitive)
    return primitive


def _like(x: Any, dtype: Any = None) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(x.shape, x.dtype if dtype is None else dtype)


def _out(_: Any, x: Any, *__: Any) -> list[jax.core.ShapedArray]:
    return [_like(x)]


def _out_and_pass(_: Any, x: Any, *__: Any) -> list[jax.core.ShapedArray]:
    return [_like(x), jax.core.ShapedArray((), np.dtype(np.uint32))]


def _gradients(_: Any, x: Any, __: Any, weights: Any, *others: Any, with_lora: bool) -> list[Any]:
    lora = [_like(each, np.dtype(np.float32)) for each in others[:-2]] if with_lora else []
    return [_like(x), _like(weights), *lora]


def _as_rows(operands: Sequence[Any], axes: Sequence[Any], places: Sequence[int]) -> list[Any]:
    """Operands of which those at some places have the axis of vmap in front, whether they had one or not."""
    pairs = list(zip(operands, axes, strict=True))
    size = next(x.shape[axis] for x, axis in pairs if axis is not None)

    def in_front(x: Any, axis: int | None) -> Any:
        return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)

    return [in_front(x, axis) if i in places else x for i, (x, axis) in enumerate(pairs)]


def _one_by_one(primitive: Primitive, operands: Any, axes: Any, **parameters: Any) -> tuple[Any, Any]:
    """A call for each element of the axis of vmap."""
    mapped = [i for i, axis in enumerate(axes) if axis is not None]

    def call(some: Any) -> Any:
        all_of_them = dict(enumerate(operands)) | dict(zip(mapped, some, strict=True))
        return primitive.bind(*(all_of_them[i] for i in range(len(operands))), **parameters)

    results = jax.lax.map(call, [jnp.moveaxis(operands[i], axes[i], 0) for i in mapped])
    return results, [0] * len(results)


def _batch_forward(primitive: Primitive, operands: Any, axes: Any) -> tuple[Any, Any]:
    """One call whose rows are those of all, unless layers or adapters differ."""
    if any(axis is not None for i, axis in enumerate(axes) if i not in _ROWS):
        return _one_by_one(primitive, operands, axes)
    results = primitive.bind(*_as_rows(operands, axes, _ROWS))
    return results, [0, None][: len(results)]  # a pass is one for all


def _batch_backward(primitive: Primitive, operands: Any, axes: Any, with_lora: bool) -> tuple[Any, Any]:
    """The same; but gradients of adapters are those of each element, and so are the passes gone back."""
    number_of_pass, grad = len(operands) - 2, len(operands) - 1
    places = (*_ROWS, grad)
    if not with_lora and all(axis is None for i, axis in enumerate(axes) if i not in places):
        results = primitive.bind(*_as_rows(operands, axes, places), with_lora=with_lora)
        return results, [0] * len(results)
    operands = list(operands)
    if axes[number_of_pass] is None:  # that of all elements together is that of none
        operands[number_of_pass] = jnp.zeros_like(operands[number_of_pass])
    return _one_by_one(primitive, operands, axes, with_lora=with_lora)


_forward_p = _primitive("forward", _out, _batch_forward)
_forward_sft_p = _primitive("forward_sft", _out, _batch_forward)
_forward_saved_p = _primitive("forward_saved", _out_and_pass, _batch_forward)
_backward_p = _primitive("backward", _gradients, _batch_backward)
