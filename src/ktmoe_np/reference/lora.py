"""The low-rank adapters beside the projections of the experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .activation import Array
from .dropout import Dropout
from .forward import Precision
from .inputs import FLOATS, AnyArray, ForwardInputs, check_array

__all__ = ["Adapter", "LoraWeights", "make_adapters"]


@dataclass(frozen=True)
class LoraWeights:
    """The LoRA matrices of one layer; expert e adds s * (x . A[e]^T) . B[e]^T to a projection.

    The values are rounded to bfloat16 before anything is computed with them. Like the weights of the layer
    they are those of the logical experts: `physical_to_logical_map` applies to them too, and gradients come
    back in the order of these arrays.

    Parameters
    ----------
    gate_lora_a, up_lora_a : ndarray of bfloat16 or float32, [E, R, H]
    gate_lora_b, up_lora_b : ndarray of bfloat16 or float32, [E, I, R]
        Those of up are None exactly when the activation is not gated.
    down_lora_a : ndarray of bfloat16 or float32, [E, R, I]
    down_lora_b : ndarray of bfloat16 or float32, [E, H, R]
    lora_alpha : float
        The adapters are scaled by s = lora_alpha / R.

    Raises
    ------
    ValueError, TypeError
        `lora_alpha` is not finite, or no number. The arrays are checked with the layer, by `moe_forward_sft`.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.zeros((1, 4, 3), np.float32), np.zeros((1, 3, 4), np.float32)
    >>> LoraWeights(a, b, a, b, a, b, lora_alpha=8.0).scale()
    np.float32(2.0)
    """

    gate_lora_a: AnyArray
    gate_lora_b: AnyArray
    up_lora_a: AnyArray | None
    up_lora_b: AnyArray | None
    down_lora_a: AnyArray
    down_lora_b: AnyArray
    lora_alpha: float

    def __post_init__(self) -> None:
        if not isinstance(self.lora_alpha, Real):
            raise TypeError(f"lora_alpha: got {self.lora_alpha!r}, expected a number")
        if not math.isfinite(self.lora_alpha):
            raise ValueError(f"lora_alpha: got {self.lora_alpha!r}, expected a finite number")

    def scale(self, dropout_rate: float = 0.0) -> np.float32:
        """Compute s = lora_alpha / R / (1 - dropout_rate) in float64, rounded to float32 once; 0 for R = 0.

        Dropout multiplies what it keeps by 1 / (1 - rate). Taken into s, that factor acts in float32 beside
        the other one, and the input of an adapter is not rounded again.
        """
        rank = self.gate_lora_a.shape[1]
        return np.float32(float(self.lora_alpha) / rank / (1.0 - dropout_rate) if rank else 0.0)


@dataclass(frozen=True)
class Adapter:
    """The adapters of one projection in one forward pass, K features to N, by physical expert."""

    a: Array  # [E, R, K]
    b: Array  # [E, N, R]
    scale: Array  # s, a scalar
    kept: NDArray[np.bool_] | None  # [T, K], False where dropout makes an input 0; None without dropout
    precision: Precision

    def dropped(self, x: Array, token: NDArray[np.intp]) -> Array:
        """Rows [M, K] of the tokens `token`, with 0 for dropped elements."""
        return x if self.kept is None else np.where(self.kept[token], x, x.dtype.type(0))

    def hidden(self, e: int, dropped: Array) -> Array:
        """Compute the LoRA hidden states bf(x . A^T), [M, R], of rows that went through `dropped`."""
        return self.precision.bf(dropped @ self.a[e].T)

    def output(self, e: int, x: Array, token: NDArray[np.intp]) -> Array:
        """Compute s * (bf(x . A^T) . B^T), [M, N]."""
        result: Array = self.hidden(e, self.dropped(x, token)) @ self.b[e].T
        return self.scale * result


def make_adapters(
    lora: LoraWeights, inputs: ForwardInputs, dropout: Dropout | None, precision: Precision
) -> dict[str, Adapter]:
    """Check the adapters of a layer and bring them to one form, under "gate", "up" and "down".

    An exact computation takes matrices of any float dtype, and their values as they are.
    """
    tokens, hidden = inputs.x.shape
    inter = inputs.gate[0].shape[0]
    sizes = {"E": len(inputs.gate), "H": hidden, "I": inter}
    sizes["R"] = _matrix("gate_lora_a", lora.gate_lora_a, "ERH", sizes, precision).shape[1]
    scale = np.asarray(lora.scale(dropout.rate if dropout else 0.0), precision.dtype)

    def adapter(projection: str, shape_a: str, shape_b: str, kept: NDArray[np.bool_] | None) -> Adapter:
        a, b = (
            _matrix(name, getattr(lora, name), shape, sizes, precision)[inputs.order]
            for name, shape in ((f"{projection}_lora_a", shape_a), (f"{projection}_lora_b", shape_b))
        )
        return Adapter(a, b, scale, kept, precision)

    kept_x = dropout.mask(tokens, hidden, "x") if dropout else None
    kept_h = dropout.mask(tokens, inter, "h") if dropout else None
    adapters = {"gate": adapter("gate", "ERH", "EIR", kept_x), "down": adapter("down", "ERI", "EHR", kept_h)}
    if inputs.up is not None:
        adapters["up"] = adapter("up", "ERH", "EIR", kept_x)
    elif lora.up_lora_a is not None or lora.up_lora_b is not None:
        name = "up_lora_a" if lora.up_lora_a is not None else "up_lora_b"
        raise ValueError(
            f"{name}: got one, expected None: activation {inputs.activation.name} has one projection"
        )
    return adapters


def _matrix(name: str, value: object, shape: str, sizes: Mapping[str, int], precision: Precision) -> Array:
    """`value` of the shape that the letters say, with the values that are computed with."""
    dtypes = FLOATS if precision.exact else (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
    array = check_array(name, value, tuple(shape), sizes, *dtypes)
    return precision.bf(array.astype(precision.dtype))
