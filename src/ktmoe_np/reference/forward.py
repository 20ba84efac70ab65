"""The layer, to the rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..config import ActivationSpec
from .activation import Array, activate, round_bf16
from .inputs import AnyArray, ForwardInputs, Weights, check_inputs, check_out_dtype, finite_rows
from .weights import ExpertWeights

__all__ = [
    "Precision",
    "Rows",
    "combine",
    "moe_forward",
    "project",
    "rounded",
    "rows_by_expert",
]


@dataclass(frozen=True)
class Precision:
    """The numbers of a computation: their dtype, and whether it rounds to bfloat16 at all."""

    dtype: np.dtype[Any]
    exact: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (np.float32, np.float64):
            raise ValueError(f"accumulate_dtype: got {self.dtype}, expected float32 or float64")

    def bf(self, x: Array) -> Array:
        """bf(x) in the dtype of the computation, or x itself when that is exact."""
        return x if self.exact else round_bf16(x).astype(self.dtype)


def moe_forward(
    hidden_states: AnyArray,
    topk_ids: AnyArray,
    topk_weights: AnyArray,
    gate_proj: Weights,
    up_proj: Weights | None,
    down_proj: Weights,
    *,
    gate_bias: AnyArray | None = None,
    up_bias: AnyArray | None = None,
    down_bias: AnyArray | None = None,
    activation: str | ActivationSpec | Mapping[str, Any] = "silu",
    gpu_experts_mask: AnyArray | None = None,
    physical_to_logical_map: AnyArray | None = None,
    out_dtype: DTypeLike = ml_dtypes.bfloat16,
    base: AnyArray | None = None,
    product: str = "bfloat16",
    activation_dtype: str | None = None,
    scale_inputs: bool = False,
    accumulate_dtype: DTypeLike = np.float32,
) -> AnyArray:
    """Run the experts of one layer on a batch of tokens.

    ::

        for token t, slot p, e = topk_ids[t, p]:
          skip when e < 0 or gpu_experts_mask[e]        (weights are not renormalized)
          g = X[t] . Wg[e]^T + gate_bias[e]             fp32 [I]
          u = X[t] . Wu[e]^T + up_bias[e]               fp32 [I]
          h = bf(act(g, u))                             one rounding
          y = h . Wd[e]^T + down_bias[e]                fp32 [H]
        out[t] = bf(base[t] + sum over p in slot order of topk_weights[t, p] * y)

    With quantized weights a product is, for each row m of x and each output n::

        product="bfloat16"    (sum over k of x[m, k] * code[n, k]) * channel_scale[n]
        product="int8"        (float32(sum over k of xq[m, k] * code[n, k]) * x_scale[m]) * channel_scale[n]

    with the codes of the matrix (int8 of an `Int8Matrix`, m * q of an `Int4Matrix`), xq and x_scale from
    `quantize_activations` of X and of h, and exact integer sums. An `Int8GroupMatrix` has no channel scale:
    its weights are bf(code * group_scale). Those of an `IntegerMatrix` are bf(values), with a channel scale
    when there is one.

    With ``activation_dtype="int8"`` products with an `IntegerMatrix` or an Int8, Int8Group or Int4 matrix are
    those of `integer_product` instead: activations X and h become int8 in blocks.

    With `scale_inputs` the routing weights act on what enters the experts, not on what leaves them::

        x' = bf(topk_weights[t, p] * X[t])            in the place of X[t]; the int8 codes are of this row
        out[t] = bf(base[t] + sum over p in slot order of y)

    A row x' that is not finite is computed as if all of it were NaN.

    A token with a NaN or an infinity in its hidden state gets a row of NaN when at least one of its slots is
    computed; one with a NaN routing weight when that slot is computed. No other row changes.

    Parameters
    ----------
    hidden_states : ndarray of bfloat16, [T, H]
        X.
    topk_ids : ndarray of any integer dtype, [T, P]
        Experts of each token; an id may occur twice in a row and then counts twice.
    topk_weights : ndarray of float32, [T, P]
        Routing weights.
    gate_proj : ndarray of bfloat16 [E, I, H], E arrays [I, H], or a quantized or integer matrix
        Wg; of an activation that is not gated, the one projection. float32 and float16 are rounded to
        bfloat16.
    up_proj : like `gate_proj`, or None
        Wu; None exactly when the activation is not gated.
    down_proj : ndarray of bfloat16 [E, H, I], E arrays [H, I], or a quantized or integer matrix
        Wd.
    gate_bias, up_bias : ndarray of float32, float16 or bfloat16, [E, I], optional
    down_bias : ndarray of float32, float16 or bfloat16, [E, H], optional
    activation : str, ActivationSpec or mapping, optional
        See `ktmoe_np.config.parse_activation`.
    gpu_experts_mask : ndarray of bool, [E], optional
        True for experts that something else computes.
    physical_to_logical_map : ndarray of int64, [E], optional
        Expert id i uses the weights and biases of expert map[i].
    out_dtype : dtype, optional
        bfloat16, float32 or float64.
    base : ndarray of bfloat16, float16, float32 or float64, [T, H], optional
        What the result is added to: the previous content of an incremental output.
    product : {"bfloat16", "int8"}, optional
        What quantized weights are multiplied with: activations as they are, or their int8 codes, for which
        all weights must be of `Int8Matrix` or `Int4Matrix`.
    activation_dtype : {None, "bfloat16", "int8"}, optional
        What activations are in products with integers times scales: with "int8", in blocks, each with a scale
        of its own. None is what `product` says. Plain arrays and a `ScaledMatrix` are multiplied as ever.
    scale_inputs : bool, optional
        The routing weights scale the inputs of the experts, as in Llama-4.
    accumulate_dtype : dtype, optional
        float32, or float64 for an exact result to compare with: the roundings to bfloat16
        and the int8 codes and scales of activations stay, everything else is in float64.

    Returns
    -------
    ndarray of `out_dtype`, [T, H]

    Raises
    ------
    ValueError
        A shape, an activation, a map entry, or a dtype of the result that does not fit; int8 activations that
        no projection can use.
    TypeError
        An argument that is not an array or has another dtype.
    IndexError
        An id that is E or more.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> x = np.ones((1, 2), ml_dtypes.bfloat16)
    >>> gate = np.ones((3, 4, 2), ml_dtypes.bfloat16)
    >>> down = np.ones((3, 2, 4), ml_dtypes.bfloat16)
    >>> ids, weights = np.array([[2, -1]]), np.float32([[0.5, 9.0]])
    >>> moe_forward(x, ids, weights, gate, None, down, activation="relu2", out_dtype=np.float32)
    array([[8., 8.]], dtype=float32)
    """
    precision = Precision(np.dtype(accumulate_dtype))
    result_dtype = check_out_dtype(out_dtype)
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
        base=base,
        product=product,
        activation_dtype=activation_dtype,
        scale_inputs=scale_inputs,
    )
    # Infinities that finite weights sum up to are values, not mistakes: nothing here warns.
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return rounded(combine(inputs, _expert_outputs(inputs, precision)), result_dtype)


class Rows(NamedTuple):
    """The slots of one expert, in the order of the tokens: their tokens and their positions in the token."""

    expert: int
    token: NDArray[np.intp]  # [M]
    slot: NDArray[np.intp]  # [M]


def rows_by_expert(ids: NDArray[np.int64]) -> Iterator[Rows]:
    """Yield the computed slots of each expert that has some, from `ids` [T, P]."""
    for e in np.unique(ids[ids >= 0]):
        yield Rows(int(e), *np.nonzero(ids == e))


def _expert_outputs(inputs: ForwardInputs, precision: Precision) -> Array:
    """Compute y of every computed slot, [T, P, H]; 0 for the others."""
    y = np.zeros((*inputs.ids.shape, inputs.x.shape[1]), precision.dtype)
    for e, t, p in rows_by_expert(inputs.ids):
        x = inputs.expert_rows(t, p).astype(precision.dtype)
        gate = project(x, inputs.gate[e], inputs.gate_bias, e)
        up = None if inputs.up is None else project(x, inputs.up[e], inputs.up_bias, e)
        h = precision.bf(activate(inputs.activation, gate, up))
        y[t, p] = project(h, inputs.down[e], inputs.down_bias, e)
    return y


def project(x: Array, weights: ExpertWeights, bias: AnyArray | None, e: int) -> Array:
    """Compute x . W^T + bias[e]: [M, K] and [N, K] to [M, N]."""
    result = weights.product(x)
    return result if bias is None else result + bias[e].astype(x.dtype)


def combine(inputs: ForwardInputs, y: Array) -> Array:
    """Add the weighted slots, in their order, to the base, [T, H]."""
    computed = inputs.ids >= 0
    routing = np.where(computed, inputs.combine_weights, 0).astype(y.dtype)
    total = np.zeros((y.shape[0], y.shape[2]), y.dtype)
    for p in range(y.shape[1]):
        total += routing[:, p, None] * y[:, p]
    if inputs.base is not None:
        total = inputs.base.astype(y.dtype) + total
    total[computed.any(axis=1) & ~finite_rows(inputs.x)] = np.nan
    return total


def rounded(total: Array, dtype: np.dtype[Any]) -> AnyArray:
    """Round sums to the dtype of a result."""
    if dtype == ml_dtypes.bfloat16:
        return round_bf16(total).astype(ml_dtypes.bfloat16)
    return total.astype(dtype)
