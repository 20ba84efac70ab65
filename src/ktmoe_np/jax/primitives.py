"""The JAX primitives of calls of layers: their results, their batching, and their handlers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from .. import kt_kernel_ext as ext

__all__ = [
    "backward_p",
    "drain_deferred_p",
    "forward_deferred_p",
    "forward_p",
    "forward_saved_p",
    "forward_sft_p",
]

#: Operands whose leading axes count as rows, in all calls; the layer's number comes before them.
_ROWS = (1, 2, 3)


def _primitive(
    name: str,
    results: Callable[..., list[jax.core.ShapedArray]],
    batcher: Callable[..., Any] | None,
    has_side_effect: bool = False,
) -> Primitive:
    """Make a primitive that is lowered to the handlers of that name."""
    primitive = Primitive(f"ktmoe_{name}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(results)

    @functools.cache
    def compiled(**parameters: Any) -> Any:
        return jax.jit(functools.partial(primitive.bind, **parameters))

    primitive.def_impl(lambda *operands, **parameters: compiled(**parameters)(*operands))
    target = f"ktmoe_np.{name}"
    jax.ffi.register_ffi_target(target, ext.xla.handlers()[name], platform="cpu")
    jax.ffi.register_ffi_target(target, ext.xla.cuda_handlers()[name], platform="CUDA")

    def lower(context: Any, *operands: Any, **_: Any) -> Any:
        return jax.ffi.ffi_lowering(target, has_side_effect=has_side_effect)(context, *operands)

    def refuse(context: Any, *_: Any, **__: Any) -> Any:
        platforms = ", ".join(context.module_context.platforms)
        raise NotImplementedError(f"ktmoe_np.{name}: got a program for {platforms}, expected cpu or cuda")

    mlir.register_lowering(primitive, lower, platform="cpu")
    mlir.register_lowering(primitive, lower, platform="cuda")
    mlir.register_lowering(primitive, refuse)
    if batcher is not None:
        batching.primitive_batchers[primitive] = functools.partial(batcher, primitive)
    return primitive


def _like(x: Any, dtype: Any = None) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(x.shape, x.dtype if dtype is None else dtype)


def _out(_: Any, x: Any, *__: Any) -> list[jax.core.ShapedArray]:
    return [_like(x)]


def _out_and_number(_: Any, x: Any, *__: Any) -> list[jax.core.ShapedArray]:
    return [_like(x), jax.core.ShapedArray((), np.dtype(np.uint32))]


def _remaining(_: Any, *, shape: tuple[int, ...]) -> list[jax.core.ShapedArray]:
    return [jax.core.ShapedArray(shape, jnp.dtype(jnp.bfloat16))]


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


forward_p = _primitive("forward", _out, _batch_forward)
forward_sft_p = _primitive("forward_sft", _out, _batch_forward)
forward_saved_p = _primitive("forward_saved", _out_and_number, _batch_forward)
backward_p = _primitive("backward", _gradients, _batch_backward)
# Two calls are two also when their operands are the same: each carry is used once.
forward_deferred_p = _primitive("forward_deferred", _out_and_number, None, has_side_effect=True)
drain_deferred_p = _primitive("drain_deferred", _remaining, None, has_side_effect=True)
