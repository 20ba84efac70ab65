"""The forward pass of training: the layer with adapters, and what it keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from ..config import ActivationSpec
from .activation import Array, activate
from .dropout import Dropout
from .forward import Precision, Rows, combine, project, rounded, rows_by_expert
from .inputs import AnyArray, ForwardInputs, Weights, check_inputs, check_out_dtype, finite_rows
from .lora import Adapter, LoraWeights, make_adapters
from .weights import ExpertWeights

__all__ = ["ForwardCache", "moe_forward_sft"]


@dataclass(frozen=True)
class ForwardCache:
    """The values of one forward pass for `moe_backward`. Skipped slots are 0."""

    inputs: ForwardInputs  # a row of `x` that is not finite is all NaN
    adapters: Mapping[str, Adapter]  # "gate", "up", "down"; empty without LoRA
    precision: Precision
    gate: AnyArray  # g [T, P, I], in the requested dtype
    up: AnyArray | None  # u, likewise; None when the activation is not gated
    h: AnyArray  # [T, P, I]


def moe_forward_sft(
    hidden_states: AnyArray,
    topk_ids: AnyArray,
    topk_weights: AnyArray,
    gate_proj: Weights,
    up_proj: Weights | None,
    down_proj: Weights,
    *,
    lora: LoraWeights | None = None,
    dropout: Dropout | None = None,
    cache_dtype: DTypeLike = ml_dtypes.bfloat16,
    gate_bias: AnyArray | None = None,
    up_bias: AnyArray | None = None,
    down_bias: AnyArray | None = None,
    activation: str | ActivationSpec | Mapping[str, Any] = "silu",
    gpu_experts_mask: AnyArray | None = None,
    physical_to_logical_map: AnyArray | None = None,
    product: str = "bfloat16",
    activation_dtype: str | None = None,
    scale_inputs: bool = False,
    out_dtype: DTypeLike = ml_dtypes.bfloat16,
    accumulate_dtype: DTypeLike = np.float32,
    exact: bool = False,
) -> tuple[AnyArray, ForwardCache]:
    """Run the experts of one layer with their adapters, and keep what the backward pass needs.

    As `moe_forward`, but with the matrices A and B of `lora`, and s its scale::

        ug = bf(x Ag^T)                        uu = bf(x Au^T)
        g = x Wg^T + bias + s * ug Bg^T        u = x Wu^T + bias + s * uu Bu^T       fp32 [I]
        h = bf(act(g, u))                      ud = bf(h Ad^T)
        y = h Wd^T + bias + s * ud Bd^T
        out[t] = bf(sum over p in slot order of topk_weights[t, p] * y)

    The cache holds g and u rounded once more, to `cache_dtype`; the activation takes them before that. With
    dropout, A takes x and h with 0 where the mask is False, and s has the factor 1 / (1 - rate).

    With `scale_inputs` x is bf(topk_weights[t, p] * x[t]) in all of these, dropout acts on that, and out is
    the sum of y. A token with a NaN or an infinity in its hidden state is computed as if all of it were NaN.

    Parameters
    ----------
    hidden_states, topk_ids, topk_weights, gate_proj, up_proj, down_proj, gate_bias, up_bias, down_bias, \
activation, gpu_experts_mask, physical_to_logical_map, product, activation_dtype, scale_inputs, out_dtype
        As in `moe_forward`. `product` and `activation_dtype` are how the base weights are multiplied with;
        adapters take x and h as they are, and gradients go through the weights in bfloat16.
    lora : LoraWeights, optional
        Without it, and with R = 0 or B = 0, the result is that of `moe_forward`, bit for bit.
    dropout : Dropout, optional
        Dropout on the inputs of the adapters.
    cache_dtype : dtype, optional
        bfloat16 or float32: what g and u are kept in.
    accumulate_dtype : dtype, optional
        float32, or float64 for an exact result to compare with: the roundings to bfloat16 stay,
        everything else, a float32 cache included, is in float64.
    exact : bool, optional
        Compute the function that the above approximates: in float64 and without any rounding, whatever the
        requested dtypes. Every array of numbers may then have any float dtype, float64 too; quantized weights
        are code * scale, activations are not quantized.

    Returns
    -------
    out : ndarray of `out_dtype`, [T, H]
        float64 when `exact`.
    cache : ForwardCache
        For one `moe_backward` or several. Refers to the weights and the routing given, copies the rest.

    Raises
    ------
    ValueError, TypeError, IndexError
        As in `moe_forward`, for the matrices of `lora` and the numbers of `dropout` too, and for another
        `cache_dtype`.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> one = np.ones((1, 2, 2), ml_dtypes.bfloat16)
    >>> a, b = np.ones((1, 1, 2), np.float32), np.ones((1, 2, 1), np.float32)
    >>> lora = LoraWeights(a, b, None, None, a, b, lora_alpha=0.5)
    >>> routing = np.array([[0]]), np.float32([[1]])
    >>> out, cache = moe_forward_sft(one[0, :1], *routing, one, None, one, activation="relu2", lora=lora)
    >>> out.astype(np.float32), cache.h.shape    # g = 2 + 0.5 * 2, h = 9, y = 18 + 0.5 * 18
    (array([[27., 27.]], dtype=float32), (1, 1, 2))
    """
    for name, value, wanted in (("lora", lora, LoraWeights), ("dropout", dropout, Dropout)):
        if not isinstance(value, wanted | None):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a {wanted.__name__}")
    precision = Precision(np.dtype(np.float64 if exact else accumulate_dtype), exact)
    result_dtype = np.dtype(np.float64) if exact else check_out_dtype(out_dtype)
    kept_dtype = _kept_dtype(cache_dtype, precision)
    inputs = check_inputs(
        hidden_states,
        topk_ids,
        topk_weights,
        gate_proj,
        up_proj,
        down_proj,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        activation=activation,
        gpu_experts_mask=gpu_experts_mask,
        physical_to_logical_map=physical_to_logical_map,
        product=product,
        activation_dtype=activation_dtype,
        scale_inputs=scale_inputs,
        exact=exact,
    )
    x = inputs.x
    inputs = replace(inputs, x=np.where(finite_rows(x)[:, None], x, x.dtype.type(np.nan)))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        adapters = {} if lora is None else make_adapters(lora, inputs, dropout, precision)
        cache = _empty_cache(inputs, adapters, precision, kept_dtype)
        y = np.zeros((*inputs.ids.shape, inputs.x.shape[1]), precision.dtype)
        for rows in rows_by_expert(inputs.ids):
            y[rows.token, rows.slot] = _run_expert(cache, rows)
        return rounded(combine(inputs, y), result_dtype), cache


def _run_expert(cache: ForwardCache, rows: Rows) -> Array:
    """Compute y [M, H] of the slots of one expert, and fill their part of the cache."""
    (e, t, p), inputs, precision = rows, cache.inputs, cache.precision

    def projection(name: str, x: Array, weights: ExpertWeights, bias: AnyArray | None) -> Array:
        base = project(x, weights, bias, e)
        return base + cache.adapters[name].output(e, x, t) if name in cache.adapters else base

    x = inputs.expert_rows(t, p, exact=precision.exact).astype(precision.dtype)
    gate, up = projection("gate", x, inputs.gate[e], inputs.gate_bias), None
    cache.gate[t, p] = rounded(gate, cache.gate.dtype)
    if inputs.up is not None and cache.up is not None:
        up = projection("up", x, inputs.up[e], inputs.up_bias)
        cache.up[t, p] = rounded(up, cache.up.dtype)
    h = precision.bf(activate(inputs.activation, gate, up))
    cache.h[t, p] = rounded(h, cache.h.dtype)
    return projection("down", h, inputs.down[e], inputs.down_bias)


def _empty_cache(
    inputs: ForwardInputs, adapters: Mapping[str, Adapter], precision: Precision, kept_dtype: np.dtype[Any]
) -> ForwardCache:
    shape = (*inputs.ids.shape, inputs.gate[0].shape[0])
    return ForwardCache(
        inputs=inputs,
        adapters=adapters,
        precision=precision,
        gate=np.zeros(shape, kept_dtype),
        up=None if inputs.up is None else np.zeros(shape, kept_dtype),
        h=np.zeros(shape, precision.dtype if precision.exact else ml_dtypes.bfloat16),
    )


def _kept_dtype(cache_dtype: DTypeLike, precision: Precision) -> np.dtype[Any]:
    """Return the dtype that g and u are kept in: float32 means unrounded, so that of the computation."""
    dtype = np.dtype(cache_dtype)
    if dtype not in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)):
        raise ValueError(f"cache_dtype: got {dtype}, expected bfloat16 or float32")
    return precision.dtype if precision.exact or dtype == np.float32 else dtype
