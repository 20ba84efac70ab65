"""The results of a backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import Array
from ..arrays.summary import arrays_summary, object_summary
from ..config import MoEConfig

__all__ = ["LORA_NAMES", "PROJECTION_NAMES", "SFTGradients", "lora_shapes", "projection_shapes"]

LORA_NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")
PROJECTION_NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False, repr=False)
class SFTGradients:
    """The gradients of one backward pass; None for what is not trained or does not exist.

    Arrays are of the kind of the gradient of the output, NumPy's or another library's, or those that the
    caller gave. T stands for the leading axes of that gradient.

    Those of matrices are sums over tokens, in the shape of the arrays that they are the gradients of and by
    expert of the checkpoint; `ktmoe_np.reference.moe_backward` states the formulas.
    """

    grad_input: Array  #: bfloat16 [T, H]
    grad_weights: NDArray[np.float32]  #: [T, P], of the routing weights; 0 for skipped slots
    gate_lora_a: NDArray[np.float32] | None = None  #: [E, R, H]
    gate_lora_b: NDArray[np.float32] | None = None  #: [E, I, R]
    up_lora_a: NDArray[np.float32] | None = None  #: [E, R, H]
    up_lora_b: NDArray[np.float32] | None = None  #: [E, I, R]
    down_lora_a: NDArray[np.float32] | None = None  #: [E, R, I]
    down_lora_b: NDArray[np.float32] | None = None  #: [E, H, R]
    gate_proj: NDArray[np.float32] | None = None  #: [E, I, H]
    up_proj: NDArray[np.float32] | None = None  #: [E, I, H]
    down_proj: NDArray[np.float32] | None = None  #: [E, H, I]

    def __repr__(self) -> str:
        return object_summary(
            self, lambda: arrays_summary({field.name: getattr(self, field.name) for field in fields(self)})
        )

    @property
    def matrices(self) -> dict[str, NDArray[np.float32]]:
        """The gradients of matrices that there are, under the names of `update_lora_weights`."""
        every = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return {name: value for name, value in every.items() if value is not None}


def lora_shapes(config: MoEConfig, rank: int) -> dict[str, tuple[int, int, int]]:
    """The shapes of a layer's adapters by name; without those of up when the activation is not gated."""
    num, hidden, inter = config.num_experts, config.hidden_size, config.moe_intermediate_size
    first, last = ((num, rank, hidden), (num, inter, rank)), ((num, rank, inter), (num, hidden, rank))
    return _gated(config, dict(zip(LORA_NAMES, first + first + last, strict=True)) if rank else {})


def projection_shapes(config: MoEConfig) -> dict[str, tuple[int, int, int]]:
    """The shapes of a layer's base weights by name; without up when the activation is not gated."""
    num, hidden, inter = config.num_experts, config.hidden_size, config.moe_intermediate_size
    shapes = ((num, inter, hidden), (num, inter, hidden), (num, hidden, inter))
    return _gated(config, dict(zip(PROJECTION_NAMES, shapes, strict=True)))


def _gated(config: MoEConfig, shapes: Mapping[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
    gated = config.activation.gated
    return {name: shape for name, shape in shapes.items() if gated or not name.startswith("up_")}
