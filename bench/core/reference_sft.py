"""What a training step's answer is: output and gradients in float32, without any rounding between."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .cases import Case
from .layer import Array, Layer, to_float32
from .reference import Sample, activate, choose_rows

__all__ = ["reference_step", "sample_step"]

#: Experts whose adapters' gradients are checked.
_MAX_EXPERTS = 8


def sample_step(layer: Layer, case: Case) -> Sample:
    """Sample rows of what tokens have, and experts, spread evenly among those in use."""
    used = np.unique(case.ids)
    chosen = np.linspace(0, len(used) - 1, min(len(used), _MAX_EXPERTS)).astype(int)
    return Sample(choose_rows(layer, case, layer.shape.step_flop(1)), used[chosen])


def reference_step(layer: Layer, case: Case, sample: Sample) -> dict[str, Array]:
    """Compute y, grad_input and grad_weights of the sampled rows, and the sampled experts' gradients."""
    rows = sample.rows
    answer = {
        "y": np.zeros((len(rows), layer.shape.hidden), np.float32),
        "grad_input": np.zeros((len(rows), layer.shape.hidden), np.float32),
        "grad_weights": np.zeros((len(rows), layer.shape.per_token), np.float32),
    }
    for e in np.unique(case.ids[rows]):
        t, p = np.nonzero(case.ids[rows] == e)
        step = _Expert(layer, int(e)).step(case, rows[t], p)
        answer["y"][t] += step.weighted_y
        answer["grad_input"][t] += step.grad_input
        answer["grad_weights"][t, p] = step.grad_weights
    steps = [_Expert(layer, int(e)).step(case, *np.nonzero(case.ids == e)) for e in sample.experts]
    return answer | {name: np.stack([step.lora[name] for step in steps]) for name in layer.lora}


class _Step(NamedTuple):
    weighted_y: Array  # [M, H]
    grad_input: Array  # [M, H]
    grad_weights: Array  # [M]
    lora: dict[str, Array]  # gradients, named as the adapters


class _Expert:
    """One expert's matrices in float32."""

    def __init__(self, layer: Layer, e: int) -> None:
        self._activation, self._scale = layer.shape.activation, layer.shape.alpha / layer.shape.rank
        self._weights = {name: to_float32(getattr(layer, name)[e]) for name in ("gate", "up", "down")}
        biases = {name: getattr(layer, f"{name}_bias") for name in self._weights}
        self._biases = {name: 0 if bias is None else bias[e] for name, bias in biases.items()}
        self._lora = {name: to_float32(adapter[e]) for name, adapter in layer.lora.items()}

    def step(self, case: Case, t: Array, p: Array) -> _Step:
        """Run tokens `t`, whose routing weights are in the slots `p`, forward and backward."""
        if case.grad is None:
            raise ValueError("a training step needs a gradient of its output")
        x, grad, routing = to_float32(case.x[t]), to_float32(case.grad[t]), case.weights[t, p, None]
        gate, up = self._project("gate", x), self._project("up", x)
        hidden = activate(self._activation, gate, up)
        y = self._project("down", hidden)
        grad_hidden, lora = self._through("down", hidden, routing * grad)
        slope_gate, slope_up = _slopes(self._activation, gate, up)
        through_gate, lora_gate = self._through("gate", x, grad_hidden * slope_gate)
        through_up, lora_up = self._through("up", x, grad_hidden * slope_up)
        grad_input = through_gate + through_up
        return _Step(routing * y, grad_input, (grad * y).sum(axis=1), lora | lora_gate | lora_up)

    def _project(self, name: str, x: Array) -> Array:
        a, b = self._lora[f"{name}_lora_a"], self._lora[f"{name}_lora_b"]
        result: Array = x @ self._weights[name].T + self._scale * ((x @ a.T) @ b.T) + self._biases[name]
        return result

    def _through(self, name: str, x: Array, grad: Array) -> tuple[Array, dict[str, Array]]:
        """Take the gradient of a projection's result to its input `x` and its adapter."""
        a, b = self._lora[f"{name}_lora_a"], self._lora[f"{name}_lora_b"]
        hidden_gradient = self._scale * (grad @ b)
        lora = {f"{name}_lora_a": hidden_gradient.T @ x, f"{name}_lora_b": self._scale * (grad.T @ (x @ a.T))}
        return grad @ self._weights[name] + hidden_gradient @ a, lora


def _slopes(name: str, gate: Array, up: Array) -> tuple[Array, Array]:
    """Derivatives of `activate` by gate and by up."""
    if name == "silu":
        sigmoid = 1 / (1 + np.exp(-gate))
        return up * sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid
    if name == "swigluoai":
        alpha, most = np.float32(1.702), np.float32(7)
        low, middle = np.minimum(gate, most), np.clip(up, -most, most)
        sigmoid = 1 / (1 + np.exp(-alpha * low))
        slope = (middle + 1) * sigmoid * (1 + alpha * low * (1 - sigmoid))
        return slope * (gate <= most), low * sigmoid * (np.abs(up) <= most)
    raise ValueError(f"activation {name!r}: no derivative of it here")
