"""The backward pass of training, to the rounding, in the order of the chain rule."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .activation import Array, activate_gradients
from .forward import Rows, rounded, rows_by_expert
from .inputs import FLOATS, AnyArray, check_array
from .training import ForwardCache

__all__ = ["Gradients", "moe_backward"]


@dataclass(frozen=True)
class Gradients:
    """The results of `moe_backward`; None for those not requested or nonexistent.

    Sums are float32 (float64 when the forward pass accumulated in float64), in the shape and, with a
    `physical_to_logical_map`, the order of the arrays that they are the gradients of.
    """

    grad_input: AnyArray  # bf16 [T, H]; float64 of an exact computation
    grad_weights: Array  # [T, P], of the routing weights; 0 for skipped slots
    gate_lora_a: Array | None = None  # [E, R, H]
    gate_lora_b: Array | None = None  # [E, I, R]
    up_lora_a: Array | None = None
    up_lora_b: Array | None = None
    down_lora_a: Array | None = None  # [E, R, I]
    down_lora_b: Array | None = None  # [E, H, R]
    gate_proj: Array | None = None  # [E, I, H]
    up_proj: Array | None = None
    down_proj: Array | None = None  # [E, H, I]


def moe_backward(
    cache: ForwardCache, grad_output: AnyArray, *, skip_lora: bool = False, full_weight_grad: bool = False
) -> Gradients:
    """Differentiate the sum of out * grad_output, by the forward pass that `cache` is of.

    For each computed slot (t, p), with q = grad_output[t], w = topk_weights[t, p], and the rest as in
    `moe_forward_sft`; g, u and h are those of the cache::

        r = bf(q Bd)                                           [R]
        z = q Wd + s * r Ad                                    fp32 [I]
        grad_weights[t, p] = <z, h> + <q, down_bias>           fp32; equals <q, y> without keeping y
        dg, du = bf(w * z * act'(g, u))
        dug = bf(s * dg Bg)          duu = bf(s * du Bu)
        grad_input[t] = bf(sum over p in slot order of dg Wg + du Wu + dug Ag + duu Au)

    With `scale_inputs`, where x' = bf(w * x[t]) entered the expert, w is 1 in all of these and below, x below
    is x', and ::

        grad_x'[t, p] = dg Wg + du Wu + dug Ag + duu Au        fp32 [H], not rounded
        grad_weights[t, p] = <grad_x'[t, p], x[t]>
        grad_input[t] = bf(sum over p in slot order of w * grad_x'[t, p])

    Quantized weights are bf(code * scale) in all of these, whatever the product of the forward pass.

    and, summed in float32 over the slots of an expert in the order of the tokens::

        dBd += s * q^T bf(w ud)      dAd += bf(s w r)^T h
        dBg += s * dg^T ug           dAg += dug^T x            up likewise
        dWd += q^T bf(w h)           dWg += dg^T x             up likewise

    With dropout, r Ad (of h) and dug Ag + duu Au (of x) are 0 where the mask is False, and the gradients of A
    take h and x with 0 there.

    What is not finite spreads as it does through sums and products, and no further. A token whose hidden
    state is not finite (so NaN, see `moe_forward_sft`) gets NaN in its row of grad_input and in grad_weights
    of its computed slots, and makes all gradients of the weights of its experts NaN. No other row changes.

    Parameters
    ----------
    cache : ForwardCache
        From `moe_forward_sft`.
    grad_output : ndarray of bfloat16, [T, H]
        Any float dtype when the forward pass was exact.
    skip_lora : bool, optional
        Only the gradients of the input and of the routing weights: adapters are used, but not trained.
    full_weight_grad : bool, optional
        The gradients of the base weights too; they must not be quantized.

    Returns
    -------
    Gradients

    Raises
    ------
    ValueError
        `grad_output` of another shape; `skip_lora` and `full_weight_grad` both; `full_weight_grad` of
        quantized weights.
    TypeError
        `cache` or `grad_output` of another type.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> from ktmoe_np.reference import moe_forward_sft
    >>> one = np.ones((1, 2, 2), ml_dtypes.bfloat16)
    >>> x, ids, weights = one[0, :1], np.array([[0]]), np.float32([[0.5]])
    >>> out, cache = moe_forward_sft(x, ids, weights, one, None, one, activation="relu2")
    >>> grads = moe_backward(cache, np.ones((1, 2), ml_dtypes.bfloat16))
    >>> grads.grad_weights, grads.grad_input.astype(np.float32)    # out = 0.5 * 2 * (x0 + x1)^2, twice
    (array([[16.]], dtype=float32), array([[8., 8.]], dtype=float32))
    """
    if not isinstance(cache, ForwardCache):
        raise TypeError(f"cache: got {type(cache).__name__}, expected a ForwardCache")
    if skip_lora and full_weight_grad:
        raise ValueError(
            "full_weight_grad: got True, expected False with skip_lora, which leaves out gradients of weights"
        )
    precision, (tokens, hidden) = cache.precision, cache.inputs.x.shape
    dtypes = FLOATS if precision.exact else (np.dtype(ml_dtypes.bfloat16),)
    q = check_array("grad_output", grad_output, ("T", "H"), {"T": tokens, "H": hidden}, *dtypes)
    sums = _WeightSums(cache, lora=not skip_lora, full=full_weight_grad)
    grad_weights = np.zeros(cache.inputs.ids.shape, precision.dtype)
    grad_x = np.zeros((*cache.inputs.ids.shape, hidden), precision.dtype)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for rows in rows_by_expert(cache.inputs.ids):
            slots = rows.token, rows.slot
            q_rows = q[rows.token].astype(precision.dtype)
            z, grad_weights[slots] = _through_down(cache, rows, q_rows, sums)
            d_gate, d_up = _through_activation(cache, rows, z)
            grad_x[slots] = _through_first(cache, rows, "gate", d_gate, sums)
            if d_up is not None:
                grad_x[slots] += _through_first(cache, rows, "up", d_up, sums)
            if cache.inputs.scale_inputs:
                grad_x[slots], grad_weights[slots] = _through_scaling(cache, rows, grad_x[slots])
        total = np.zeros((tokens, hidden), precision.dtype)
        for p in range(grad_x.shape[1]):
            total += grad_x[:, p]
        grad_input = rounded(total, np.dtype(np.float64 if precision.exact else ml_dtypes.bfloat16))
    return Gradients(grad_input=grad_input, grad_weights=grad_weights, **sums.by_name)


def _through_down(cache: ForwardCache, rows: Rows, q: Array, sums: _WeightSums) -> tuple[Array, Array]:
    """Compute z [M, I] and the gradient of the routing weights [M] from q [M, H]."""
    (e, t, p), inputs, bf = rows, cache.inputs, cache.precision.bf
    w = inputs.combine_weights[t, p, None].astype(q.dtype)
    h = cache.h[t, p].astype(q.dtype)
    z: Array = q @ inputs.down[e].backward(q.dtype)
    if "down" in cache.adapters:
        adapter = cache.adapters["down"]
        h_dropped = adapter.dropped(h, t)
        r = bf(q @ adapter.b[e])
        z = z + adapter.scale * adapter.dropped(r @ adapter.a[e], t)
        sums.add("down_lora_b", e, adapter.scale * (q.T @ bf(w * adapter.hidden(e, h_dropped))))
        sums.add("down_lora_a", e, bf(adapter.scale * w * r).T @ h_dropped)
    sums.add("down_proj", e, q.T @ bf(w * h))
    grad_w: Array = (z * h).sum(axis=1)
    return z, grad_w if inputs.down_bias is None else grad_w + q @ inputs.down_bias[e].astype(q.dtype)


def _through_activation(cache: ForwardCache, rows: Rows, z: Array) -> tuple[Array, Array | None]:
    """Compute dg and du, [M, I], from z."""
    (_, t, p), inputs, bf = rows, cache.inputs, cache.precision.bf
    dh = inputs.combine_weights[t, p, None].astype(z.dtype) * z
    up = None if cache.up is None else cache.up[t, p].astype(z.dtype)
    slope_gate, slope_up = activate_gradients(inputs.activation, cache.gate[t, p].astype(z.dtype), up)
    return bf(dh * slope_gate), None if slope_up is None else bf(dh * slope_up)


def _through_first(cache: ForwardCache, rows: Rows, projection: str, d: Array, sums: _WeightSums) -> Array:
    """Compute the part [M, H] of the gradient of x that comes through gate or up, from dg or du."""
    (e, t, p), inputs = rows, cache.inputs
    x = inputs.expert_rows(t, p, exact=cache.precision.exact).astype(d.dtype)
    grad_x: Array = d @ getattr(inputs, projection)[e].backward(d.dtype)
    if projection in cache.adapters:
        adapter = cache.adapters[projection]
        x_dropped = adapter.dropped(x, t)
        d_inner = cache.precision.bf(adapter.scale * (d @ adapter.b[e]))
        grad_x = grad_x + adapter.dropped(d_inner @ adapter.a[e], t)
        sums.add(f"{projection}_lora_b", e, adapter.scale * (d.T @ adapter.hidden(e, x_dropped)))
        sums.add(f"{projection}_lora_a", e, d_inner.T @ x_dropped)
    sums.add(f"{projection}_proj", e, d.T @ x)
    return grad_x


def _through_scaling(cache: ForwardCache, rows: Rows, grad: Array) -> tuple[Array, Array]:
    """From the gradient [M, H] of w * x, those of x [M, H] and of w [M]."""
    (_, t, p), inputs = rows, cache.inputs
    grad_w: Array = (grad * inputs.x[t].astype(grad.dtype)).sum(axis=1)
    return inputs.routing[t, p, None].astype(grad.dtype) * grad, grad_w


class _WeightSums:
    """The requested gradients that are summed over tokens, by logical expert."""

    def __init__(self, cache: ForwardCache, *, lora: bool, full: bool) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        if lora:
            for projection, adapter in cache.adapters.items():
                shapes |= {f"{projection}_lora_a": adapter.a.shape, f"{projection}_lora_b": adapter.b.shape}
        if full:
            for name in ("gate", "up", "down"):
                experts = getattr(cache.inputs, name)
                if experts is not None:
                    if experts[0].quantized:
                        raise ValueError(
                            f"full_weight_grad: got True, expected False: {name}_proj is quantized"
                        )
                    shapes[f"{name}_proj"] = (len(experts), *experts[0].shape)
        self.by_name: dict[str, Array] = {
            name: np.zeros(shape, cache.precision.dtype) for name, shape in shapes.items()
        }
        self._order = cache.inputs.order

    def add(self, name: str, e: int, value: Array) -> None:
        """Add to the gradient of the weights that the physical expert `e` used."""
        if name in self.by_name:
            self.by_name[name][self._order[e]] += value
