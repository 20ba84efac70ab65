"""How far two correct evaluations of the layer may differ."""

from __future__ import annotations

from typing import Unpack

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from .activation import Array, round_bf16
from .forward import rows_by_expert
from .inputs import (
    AnyArray,
    ForwardInputs,
    LayerOptions,
    Weights,
    check_inputs,
    check_out_dtype,
    finite_rows,
)
from .rounding import EPS, TINY, Rounding, in_range

__all__ = ["assert_within", "error_bound"]


def error_bound(
    hidden_states: AnyArray,
    topk_ids: AnyArray,
    topk_weights: AnyArray,
    gate_proj: Weights,
    up_proj: Weights | None,
    down_proj: Weights,
    *,
    out_dtype: DTypeLike = ml_dtypes.bfloat16,
    max_chain: int | None = None,
    sigmas: float | None = None,
    activation_ulps: float = 8.0,
    **options: Unpack[LayerOptions],
) -> Array:
    """Largest difference of each element between any two evaluations that keep the specification.

    An evaluation keeps it when it rounds where the specification rounds, sums in float32 or better in any
    order, with or without fused multiply-adds, evaluates the activation to `activation_ulps`, and takes
    denormal numbers as they are or for zero. So the bound holds between an engine and `moe_forward`, and
    between two engines.

    Every quantity is given an interval, center (float64) and radius, that contains every such evaluation; e
    is 2^-24, the unit roundoff of float32::

        g, u      radius  gamma_n * (sum |x| |w| + |bias|)      n = K + 1, gamma_n = n e / (1 - n e)
        A(g)      radius  max |A(g +- dg) - A(g)| + C dg^2 / 2 + activation_ulps * e * |g|
        B(u)      likewise; B is monotone                       act = A(g) * B(u), |A''| <= C
        act       radius  |A| dB + |B| dA + dA dB + e |A B|
        h         radius  max |bf(act +- radius) - bf(act)|
        y         radius  sum |Wd| dh + gamma_n * (sum |Wd| (|h| + dh) + |bias|)
        out       radius  sum_p |w| dy + gamma_{P+2} * (sum_p |w| (|y| + dy) + |base|)
        bound     round(out + radius) - round(out - radius)

    With `scale_inputs`, x is bf(w x), which all evaluations agree on, and the w of the sum is 1.
    With a channel scale c, ``sum |x| |w|`` is that of the codes, scaled, and n is K + 2. Int8 products, whose
    sums are exact, have n = 4, and the codes q and the scale s of h have intervals too, with radii dq and ds,
    which contain their values at the ends of the intervals of h::

        y         radius  c * (2 ds |sum q code| + (s + ds) sum dq |code|) + gamma_4 * (|y| + |bias|)

    Likewise int8 activations in blocks, with a term ds and dq for each block and n from the number of groups.

    Rounding is monotone, so the lines of h and of the bound lose nothing: an element of h whose interval
    contains no rounding boundary has radius 0, one whose interval contains one may be a bf16 ulp off. All
    sums assume the worst case over signs, so the bound grows with K where the typical difference grows with
    sqrt(K): sharp up to a K of some hundreds, loose at thousands. `max_chain` and `sigmas` sharpen it.

    Parameters
    ----------
    hidden_states, topk_ids, topk_weights, gate_proj, up_proj, down_proj
        As in `moe_forward`.
    out_dtype : dtype, optional
        As in `moe_forward`.
    max_chain : int, optional
        Longest chain of float32 additions that a product of an evaluation passes through, where that is known
        to be shorter than K (lanes and tiles sum side by side): n = min(K, max_chain) + 1. Much tighter for a
        long K. Compare with ``accumulate_dtype=float64`` then: the float32 order of `moe_forward` is NumPy's.
    sigmas : float, optional
        Take rounding errors for independent with mean zero (Higham and Mary, 2019): gamma_n becomes
        sigmas * sqrt(n) * e, and ``sum |Wd| dh`` becomes ``sigmas * sqrt(sum (|Wd| dh)^2)``, likewise that of
        dq. An
        element may then fail with a probability of at most 2 exp(-sigmas^2 / 2), in practice far less; 6
        suits tests.
    activation_ulps : float, optional
        Allowed error of the engine's exp, tanh or erf, in float32 units of the gate.
    **options
        The other arguments of `moe_forward`, but for `accumulate_dtype`.

    Returns
    -------
    ndarray of float64, [T, H]
        NaN in the rows that must be NaN (see `moe_forward`); infinite where a partial sum may overflow in
        some order of summation, and where a weight is not finite: there an evaluation may give anything.

    Raises
    ------
    ValueError, TypeError, IndexError
        As in `moe_forward`, and for a `max_chain` below 1 or `sigmas` not above 0.

    Examples
    --------
    >>> import ml_dtypes, numpy as np
    >>> from ktmoe_np.reference import moe_forward
    >>> draw = np.random.default_rng(0).standard_normal
    >>> shapes = (3, 64), (2, 48, 64), (2, 48, 64), (2, 64, 48)
    >>> x, gate, up, down = (draw(shape, np.float32).astype(ml_dtypes.bfloat16) for shape in shapes)
    >>> layer = x, np.array([[0], [1], [0]]), draw((3, 1), np.float32), gate, up, down
    >>> result, exact = moe_forward(*layer), moe_forward(*layer, accumulate_dtype=np.float64)
    >>> assert_within(result, exact, error_bound(*layer))
    """
    rounding = Rounding(max_chain, sigmas, activation_ulps)
    dtype = check_out_dtype(out_dtype)
    inputs = check_inputs(hidden_states, topk_ids, topk_weights, gate_proj, up_proj, down_proj, **options)
    with np.errstate(all="ignore"):
        total, radius = _combined(inputs, rounding)
        if dtype == ml_dtypes.bfloat16:
            bound = round_bf16(total + radius).astype(np.float64) - round_bf16(total - radius) + TINY
        else:
            bound = 2.0 * radius + 2.0 * EPS * np.abs(total)
    bound = np.where(np.isnan(bound), np.inf, bound)
    bound[_poisoned(inputs)] = np.nan
    return bound


def assert_within(actual: AnyArray, expected: AnyArray, bound: Array) -> None:
    """Raise AssertionError unless ``|actual - expected| <= bound``, and NaN is where NaN is expected.

    Parameters
    ----------
    actual, expected : ndarray of any float dtype, one shape
    bound : ndarray of float64, the same shape
        From `error_bound`.

    Raises
    ------
    AssertionError
        Names the worst element.
    """
    got, want = np.asarray(actual).astype(np.float64), np.asarray(expected).astype(np.float64)
    if got.shape != want.shape or got.shape != bound.shape:
        raise AssertionError(f"shapes differ: actual {got.shape}, expected {want.shape}, bound {bound.shape}")
    with np.errstate(invalid="ignore"):
        excess = np.where(got == want, 0.0, np.abs(got - want) - bound)
    excess[np.isnan(got) & np.isnan(want)] = 0.0
    excess[np.isnan(got) != np.isnan(want)] = np.inf
    bad = ~(excess <= 0) & ~np.isposinf(bound)
    if bad.any():
        at = np.unravel_index(np.argmax(np.where(bad, np.nan_to_num(excess, nan=np.inf), -1.0)), got.shape)
        where = ", ".join(map(str, at))
        raise AssertionError(
            f"{bad.sum()} of {got.size} elements are outside the bound; worst at [{where}]: "
            f"actual {got[at]!r}, expected {want[at]!r}, bound {bound[at]!r}"
        )


def _poisoned(inputs: ForwardInputs) -> NDArray[np.bool_]:
    """Whether tokens must get NaN, [T]."""
    poisoned = np.zeros(len(inputs.x), np.bool_)
    for _, t, p in rows_by_expert(inputs.ids):
        bad = ~finite_rows(inputs.expert_rows(t, p)) | np.isnan(inputs.routing[t, p])
        poisoned[t[bad]] = True
    return poisoned


def _combined(inputs: ForwardInputs, rounding: Rounding) -> tuple[Array, Array]:
    """Center and radius of the sum before the last rounding, both [T, H]."""
    num_slots = inputs.ids.shape[1]
    base = np.zeros(inputs.x.shape) if inputs.base is None else inputs.base.astype(np.float64)
    total, radius, magnitude = base.copy(), np.zeros(base.shape), np.abs(base)
    for rows in rows_by_expert(inputs.ids):
        e, t, p = rows
        y, dy = _expert(inputs, e, inputs.expert_rows(t, p).astype(np.float64), rounding)
        weight = inputs.combine_weights[t, p, None].astype(np.float64)
        np.add.at(total, t, weight * y)
        np.add.at(radius, t, np.abs(weight) * dy)
        np.add.at(magnitude, t, np.abs(weight) * (np.abs(y) + dy))
    radius += rounding.gamma(num_slots + 2) * magnitude + num_slots * TINY
    return total, np.where(in_range(magnitude, num_slots + 2), radius, np.inf)


def _expert(inputs: ForwardInputs, e: int, x: Array, rounding: Rounding) -> tuple[Array, Array]:
    """Center and radius of y of expert `e` for the rows x [M, H], both [M, H]."""
    spec = inputs.activation
    gate_bias, up_bias, down_bias = (
        None if bias is None else bias[e] for bias in (inputs.gate_bias, inputs.up_bias, inputs.down_bias)
    )
    act, d_act = rounding.gate_factor(spec, *rounding.product(x, None, inputs.gate[e], gate_bias))
    if inputs.up is not None:
        b, db = rounding.up_factor(spec, *rounding.product(x, None, inputs.up[e], up_bias))
        d_act = np.abs(act) * db + np.abs(b) * d_act + d_act * db + EPS * np.abs(act * b)
        act = act * b
    h = round_bf16(act).astype(np.float64)
    dh = np.maximum(round_bf16(act + d_act) - h, h - round_bf16(act - d_act)) + TINY
    return rounding.product(h, dh, inputs.down[e], down_bias)
