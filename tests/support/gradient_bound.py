"""How far two correct evaluations of a training step may differ: its formulas on intervals.

Every quantity is a `Ball`: a center in float64 and a radius that holds every evaluation which sums in float32
in any order and takes the activation to some ulps; infinite where a partial result may overflow. When
`rounded`, a rounding to bfloat16 moves the center: the bound is between two evaluations of the specification,
and an element may differ only if a rounding boundary is in its interval. Else the rounding widens the radius:
the bound is to the function itself, as float64 computes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from reference_cases import AnyArray, Layer

from ktmoe_np.config import ActivationSpec, parse_activation
from ktmoe_np.reference import (
    Dropout,
    Int8GroupMatrix,
    IntegerMatrix,
    LoraWeights,
    ScaledMatrix,
    dequantize,
    gradient_weights,
    integers_of_quantized,
    product_weights,
    round_bf16,
)
from ktmoe_np.reference.activation import gate_factor, gate_slope, up_factor, up_slope
from ktmoe_np.reference.int8_activations import pieces
from ktmoe_np.reference.rounding import EPS, TINY, in_range

#: Allowed error of an engine's exp, tanh or erf, in float32 units of the operand.
ACTIVATION_ULPS = 8.0


@dataclass(frozen=True)
class Ball:
    """Every number within `radius` of `center`, elementwise."""

    center: AnyArray
    radius: AnyArray

    @property
    def reach(self) -> AnyArray:
        """The largest magnitude in it."""
        return np.abs(self.center) + self.radius

    @property
    def T(self) -> Ball:
        return Ball(self.center.T, self.radius.T)

    def computed(self, magnitude: AnyArray, num_roundings: int = 1) -> Ball:
        """This after `num_roundings` float32 roundings of sums of terms that add up to `magnitude`."""
        gamma = num_roundings * EPS / (1 - num_roundings * EPS)
        widened = Ball(self.center, self.radius + gamma * magnitude + num_roundings * TINY)
        return widened.unless_above(magnitude + self.radius, num_roundings)

    def unless_above(self, magnitude: AnyArray, num_roundings: int = 1) -> Ball:
        """This, or anything where partial results up to `magnitude` leave float32."""
        return Ball(self.center, np.where(in_range(magnitude, num_roundings), self.radius, np.inf))

    def where(self, kept: AnyArray) -> Ball:
        """This with 0 where `kept` is False."""
        return Ball(np.where(kept, self.center, 0.0), np.where(kept, self.radius, 0.0))

    def __add__(self, other: Ball) -> Ball:
        total = Ball(self.center + other.center, self.radius + other.radius)
        return total.computed(total.reach)

    def __mul__(self, other: Ball) -> Ball:
        return (_product(self, other, np.multiply)).computed(self.reach * other.reach)

    def __matmul__(self, other: Ball) -> Ball:
        num_terms = self.center.shape[-1]
        return _product(self, other, np.matmul).computed(self.reach @ other.reach, num_terms + 1)

    def bf(self, rounded: bool) -> Ball:
        low, high = round_bf16(self.center - self.radius), round_bf16(self.center + self.radius)
        center = round_bf16(self.center).astype(np.float64) if rounded else self.center
        return Ball(center, np.maximum(high - center, center - low) + TINY).unless_above(self.reach)

    def int8(self, rounded: bool) -> Ball:
        """Rows as int8 codes times their scales."""
        near, far = (np.maximum(np.abs(self.center) + sign * self.radius, 0) for sign in (-1, 1))
        rows = [magnitude.max(axis=1, keepdims=True, initial=0) for magnitude in (near, far)]
        scales = [(amax / 127).astype(np.float32).astype(np.float64) for amax in rows]
        ends = [self.center - self.radius, self.center + self.radius]
        codes = [_codes(end, scale) for end in ends for scale in scales]
        values = [code * scale for code in codes for scale in scales]
        low, high = np.minimum.reduce(values), np.maximum.reduce(values)
        center = self.center
        if rounded:
            scale = (np.abs(center).max(axis=1, keepdims=True, initial=0) / 127).astype(np.float32)
            center = _codes(center, scale) * scale.astype(np.float64)
        return Ball(center, np.maximum(high - center, center - low) + TINY).unless_above(self.reach)

    def int8_blocks(self, size: int, rounded: bool) -> Ball:
        """Blocks of so many columns as int8 codes times their scales."""
        starts = range(0, self.center.shape[1], size)
        blocks = [_take(self, np.s_[:, start : start + size]).int8(rounded) for start in starts]
        if not blocks:
            return self
        return Ball(*(np.hstack([getattr(b, part) for b in blocks]) for part in ("center", "radius")))

    def mapped(self, function: Any, curvature: float, ulps: float | AnyArray) -> Ball:
        """A function with a second derivative of at most `curvature` between its jumps and corners."""
        center = function(self.center)
        ends = [np.abs(function(self.center + sign * self.radius) - center) for sign in (-1, 1)]
        spread = np.maximum(*ends) + curvature * np.square(self.radius)
        widened = Ball(center, spread + ulps * EPS * np.maximum(self.reach, 1.0))
        return widened.unless_above(np.maximum(self.reach, widened.reach))


def _codes(x: AnyArray, scale: AnyArray) -> AnyArray:
    with np.errstate(all="ignore"):
        codes = np.clip(np.rint((x / scale).astype(np.float32)), -127, 127)
    # A row that may be zero may have any scale; its codes times scales are then as good as zero.
    return np.where(scale > 0, codes, 0).astype(np.float64)


def _product(a: Ball, b: Ball, multiply: Any) -> Ball:
    spread = multiply(np.abs(a.center), b.radius) + multiply(a.radius, np.abs(b.center))
    return Ball(multiply(a.center, b.center), spread + multiply(a.radius, b.radius))


def times(*factors: Ball) -> Ball:
    """Their product, whichever of them are multiplied first."""
    largest = reduce(np.multiply, (np.maximum(factor.reach, 1.0) for factor in factors))
    return reduce(Ball.__mul__, factors).unless_above(largest, len(factors))


def ball(values: Any) -> Ball:
    """Numbers that are known."""
    center = np.asarray(values).astype(np.float64)
    return Ball(center, np.zeros(center.shape))


@dataclass(frozen=True)
class Weights:
    """The weights of a projection, as the products of the forward and of the backward pass take them."""

    values: Ball  # [E, N, K]
    channel_scale: Ball | None  # [E, N]
    backward: Ball  # [E, N, K]
    integer: bool
    rounded: bool
    integers: IntegerMatrix | None = None  # of int8 activations in blocks

    @staticmethod
    def of(matrix: Any, product: str, rounded: bool, activation_dtype: str | None = None) -> Weights:
        if isinstance(matrix, np.ndarray):
            return Weights(ball(matrix), None, ball(matrix), False, rounded)
        in_blocks = activation_dtype == "int8" and product != "int8" and not isinstance(matrix, ScaledMatrix)
        if isinstance(matrix, IntegerMatrix) or in_blocks:
            return Weights._of_integers(matrix, in_blocks, rounded)
        backward = _backward(matrix, rounded)
        if isinstance(matrix, Int8GroupMatrix):
            return Weights(backward, None, backward, False, rounded)
        values, channel_scale = ball(product_weights(matrix)), ball(matrix.channel_scale)
        return Weights(values, channel_scale, backward, product == "int8", rounded)

    @staticmethod
    def _of_integers(matrix: Any, in_blocks: bool, rounded: bool) -> Weights:
        integers = matrix if isinstance(matrix, IntegerMatrix) else integers_of_quantized(matrix)
        values = ball(integers.values(np.float64))
        decoded = ball(integers.product_weights()) if rounded else values.bf(False)
        plain, scale = matrix, None
        if integers.channel_scale is not None:
            plain = ScaledMatrix(integers.product_weights(), integers.channel_scale)
            scale = ball(integers.channel_scale)
        backward = decoded if plain is integers else _backward(plain, rounded)
        if in_blocks:
            return Weights(values, scale, backward, False, rounded, integers)
        return Weights(decoded, scale, backward, False, rounded)

    def at(self, e: int) -> Weights:
        channel_scale = None if self.channel_scale is None else _take(self.channel_scale, e)
        return replace(
            self,
            values=_take(self.values, e),
            channel_scale=channel_scale,
            backward=_take(self.backward, e),
            integers=None if self.integers is None else self.integers[e],
        )

    def product(self, operand: Ball) -> Ball:
        if self.integers is not None:
            operand = operand.int8_blocks(self.integers.activation_block, self.rounded)
            # Sums of groups are exact; minima are terms of their own.
            reach = operand.reach @ self.integers.magnitudes().T
            num_roundings = 2 * sum(1 for _ in pieces(self.integers)) + 2
            total = _product(operand, self.values.T, np.matmul).computed(reach, num_roundings)
        else:
            total = (operand.int8(self.rounded) if self.integer else operand) @ self.values.T
        if self.channel_scale is None:
            return total
        scaled, channel_scale = total * self.channel_scale, np.maximum(self.channel_scale.reach, 1.0)
        if not self.integer:
            return scaled
        # Scales may act in any order on the sums of codes.
        scale = np.maximum(operand.reach.max(axis=1, keepdims=True, initial=0.0) / 127.0, 1.0)
        return scaled.unless_above(127.0 * self.values.reach.sum(axis=-1) * channel_scale * scale)


def _backward(matrix: Any, rounded: bool) -> Ball:
    """What gradients go through, of a quantized matrix."""
    return ball(gradient_weights(matrix)) if rounded else ball(dequantize(matrix, np.float64)).bf(False)


def curvatures(spec: ActivationSpec) -> tuple[float, float]:
    """Bounds of the second and third derivatives of both factors of an activation."""
    second = max(2.0, spec.alpha) + 1.0 / spec.beta1
    return second, 2.0 * second + spec.alpha**2


def activation_balls(spec: ActivationSpec, g: Ball, u: Ball | None) -> tuple[Ball, list[Ball]]:
    """act(g, u) and its partial derivatives."""
    second, third = curvatures(spec)
    a = g.mapped(lambda x: gate_factor(spec, x), second, ACTIVATION_ULPS * (1 + g.reach))
    a_slope = g.mapped(lambda x: gate_slope(spec, x), third, ACTIVATION_ULPS)
    if u is None:
        return a, [a_slope]
    b = u.mapped(lambda x: up_factor(spec, x), second, ACTIVATION_ULPS)
    b_slope = u.mapped(lambda x: up_slope(spec, x), third, ACTIVATION_ULPS)
    return a * b, [a_slope * b, a * b_slope]


@np.errstate(all="ignore")
def gradient_balls(
    layer: Layer, grad_output: AnyArray, *, rounded: bool, float32_cache: bool = False
) -> dict[str, Ball]:
    """The gradients of `moe_backward` by name, and the output as "out", after their last rounding.

    "float32 out" is the output before it. For layers with LoRA, without a map and a mask; `float32_cache` is
    the cache_dtype of `moe_forward_sft`.
    """
    lora: LoraWeights = layer["lora"]
    names = ("gate", "up", "down") if layer["up_proj"] is not None else ("gate", "down")
    how = layer.get("product", "bfloat16"), rounded, layer.get("activation_dtype")
    weight = {name: Weights.of(layer[f"{name}_proj"], *how) for name in names}
    a, b = ({n: ball(round_bf16(getattr(lora, f"{n}_lora_{m}"))) for n in names} for m in "ab")
    x, q, ids = ball(layer["hidden_states"]), ball(grad_output), layer["topk_ids"]
    num_experts, hidden, inter = layer["down_proj"].shape
    scales = layer.get("scale_inputs", False)
    dropout = layer.get("dropout") or Dropout(0.0)
    kept_x, kept_h = (dropout.mask(len(ids), *sizes) for sizes in ((hidden, "x"), (inter, "h")))
    result: dict[str, list[Ball]] = {
        f"{name}_{m}": [] for name in names for m in ("lora_a", "lora_b", "proj")
    }
    slots = {name: _zeros(*ids.shape, hidden) for name in ("out", "grad_input")}
    slots["grad_weights"] = _zeros(*ids.shape, 1)
    for e in range(num_experts):
        t, p = np.nonzero(ids == e)
        bias = {n: ball(layer[f"{n}_bias"][e]) for n in names if layer.get(f"{n}_bias") is not None}
        step = _expert_balls(
            parse_activation(layer["activation"]),
            _scaled(layer, t, p, rounded) if scales else _take(x, t),
            _take(q, t),
            ball(np.ones((len(t), 1)) if scales else layer["topk_weights"][t, p, None]),
            ball(lora.scale(dropout.rate)),
            {n: weight[n].at(e) for n in names},
            {n: _take(a[n], e) for n in names},
            {n: _take(b[n], e) for n in names},
            bias,
            {n: (kept_h if n == "down" else kept_x)[t] for n in names},
            rounded,
            float32_cache,
        )
        if scales:
            step |= _through_scaling(step["grad_input"], _take(x, t), ball(layer["topk_weights"][t, p, None]))
        for name, value in step.items():
            if name in slots:
                slots[name].center[t, p], slots[name].radius[t, p] = value.center, value.radius
            else:
                result[name].append(value)
    total = {
        name: Ball(np.stack([value.center for value in values]), np.stack([value.radius for value in values]))
        for name, values in result.items()
    }
    for name in ("out", "grad_input"):
        added = Ball(slots[name].center.sum(axis=1), slots[name].radius.sum(axis=1))
        total[f"float32 {name}"] = added.computed(slots[name].reach.sum(axis=1), ids.shape[1] + 1)
        total[name] = total[f"float32 {name}"].bf(rounded)
    total["grad_weights"] = _take(slots["grad_weights"], (..., 0))
    return total


def _scaled(layer: Layer, t: AnyArray, p: AnyArray, rounded: bool) -> Ball:
    """bf(w x), which all evaluations agree on, or how far it is from w x."""
    x, w = layer["hidden_states"][t], layer["topk_weights"][t, p, None]
    if rounded:
        return ball(round_bf16(w * x.astype(np.float32)))
    exact = ball(w.astype(np.float64) * x.astype(np.float64))
    return exact.computed(exact.reach).bf(False)


def _through_scaling(grad: Ball, x: Ball, w: Ball) -> dict[str, Ball]:
    """From the gradient of w x to those of w and of x."""
    terms = Ball(grad.center * x.center, grad.radius * x.reach)
    total = Ball(terms.center.sum(1, keepdims=True), terms.radius.sum(1, keepdims=True))
    magnitude = terms.reach.sum(1, keepdims=True)
    return {"grad_weights": total.computed(magnitude, x.center.shape[1] + 1), "grad_input": w * grad}


def _expert_balls(
    spec: ActivationSpec,
    x: Ball,
    q: Ball,
    w: Ball,
    s: Ball,
    weight: dict[str, Weights],
    a: dict[str, Ball],
    b: dict[str, Ball],
    bias: dict[str, Ball],
    kept: dict[str, AnyArray],
    rounded: bool,
    float32_cache: bool,
) -> dict[str, Ball]:
    """The formulas for the slots of one expert."""

    def project(name: str, operand: Ball) -> tuple[Ball, Ball]:
        lora_hidden = (operand.where(kept[name]) @ a[name].T).bf(rounded)
        result = weight[name].product(operand) + s * (lora_hidden @ b[name].T)
        return lora_hidden, result + bias[name] if name in bias else result

    first = {name: project(name, x) for name in weight if name != "down"}
    g, u = first["gate"][1], first["up"][1] if "up" in first else None
    h = activation_balls(spec, g, u)[0].bf(rounded)
    ud, y = project("down", h)
    r = (q @ b["down"]).bf(rounded)
    z = q @ weight["down"].backward + s * (r @ a["down"]).where(kept["down"])
    zh = z * h
    grad_w = Ball(zh.center.sum(1, keepdims=True), zh.radius.sum(1, keepdims=True))
    grad_w = grad_w.computed(zh.reach.sum(1, keepdims=True), h.center.shape[1])
    if "down" in bias:
        grad_w = grad_w + q @ Ball(bias["down"].center[:, None], bias["down"].radius[:, None])
    result = {"out": w * y, "grad_weights": grad_w}
    result["down_lora_b"] = s * (q.T @ (w * ud).bf(rounded))
    result["down_lora_a"] = times(s, w, r).bf(rounded).T @ h.where(kept["down"])
    result["down_proj"] = q.T @ (w * h).bf(rounded)
    cached = (g, u) if float32_cache else (g.bf(rounded), None if u is None else u.bf(rounded))
    slopes = activation_balls(spec, *cached)[1]
    for name, slope in zip(first, slopes, strict=True):
        d = times(w, z, slope).bf(rounded)
        d_inner = (s * (d @ b[name])).bf(rounded)
        part = d @ weight[name].backward + (d_inner @ a[name]).where(kept[name])
        result["grad_input"] = result["grad_input"] + part if "grad_input" in result else part
        result[f"{name}_lora_b"] = s * (d.T @ first[name][0])
        result[f"{name}_lora_a"] = d_inner.T @ x.where(kept[name])
        result[f"{name}_proj"] = d.T @ x
    return result


def _zeros(*shape: int) -> Ball:
    return Ball(np.zeros(shape), np.zeros(shape))


def _take(value: Ball, at: Any) -> Ball:
    return Ball(value.center[at], value.radius[at])
