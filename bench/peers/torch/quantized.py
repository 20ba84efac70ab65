"""PyTorch's bf16 products with quantized weights on the CPU, and matrices quantized for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...core.shapes import Shape

__all__ = ["FORMATS", "QuantizedLinear"]

#: Weights that share a scale and a zero in int4.
_GROUP = 32

#: Both sizes of a matrix must be multiples of this, which suits either product: with some other sizes
#: `_weight_int8pack_mm` does not refuse but crashes.
_STEP = 32

#: In place of a scale of 0, by which one cannot divide.
_LEAST_SCALE = 1e-6


def _pack_int8(weights: Any) -> tuple[Any, ...]:
    """One scale for each row, amax / 127."""
    weights = weights.float()
    scales = (weights.abs().amax(1) / 127).clamp(min=_LEAST_SCALE).bfloat16()
    codes = (weights / scales[:, None]).round().clamp(-127, 127)
    return codes.char(), scales


def _pack_int4(weights: Any) -> tuple[Any, ...]:
    """Codes 0 to 15 of the range of each group; a weight is (code - 8) * scale + zero."""
    import torch

    groups = weights.float().unflatten(1, (-1, _GROUP))
    low, high = groups.aminmax(dim=2)
    scales = ((high - low) / 15).clamp(min=_LEAST_SCALE).bfloat16()
    zeros = (low + 8 * scales).bfloat16()
    codes = ((groups - zeros[:, :, None]) / scales[:, :, None] + 8).round().clamp(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1)
    return packed, _GROUP, torch.stack((scales, zeros), 2).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class Format:
    """A way to quantize, and the product that goes with it."""

    family: str  #: of the backend
    copies: float  #: bytes for each byte of the bf16 weights
    product: str  #: of torch.ops.aten; takes the rows, then what `pack` gives
    pack: Callable[[Any], tuple[Any, ...]]  #: quantizes a bf16 matrix [N, K]


_INT8 = Format("torch int8pack", 1 / 2, "_weight_int8pack_mm", _pack_int8)
_INT4 = Format("torch int4pack", 5 / 16, "_weight_int4pack_mm_for_cpu", _pack_int4)

#: By method.
FORMATS = {"MOE_INT8": _INT8, "AMXINT8": _INT8, "MOE_INT4": _INT4, "AMXINT4": _INT4}


class QuantizedLinear:
    """In place of torch.nn.functional.linear, with matrices that `pack` has made.

    Raises
    ------
    NotImplementedError
        This torch or this machine has no such product, or not of these sizes.
    """

    def __init__(self, method: str, shape: Shape) -> None:
        import torch

        self._format = FORMATS[method]
        name = self._format.product
        if shape.hidden % _STEP or shape.inter % _STEP:
            sizes = f"{shape.hidden} and {shape.inter}"
            raise NotImplementedError(f"torch: {name} needs sizes that are multiples of {_STEP}, got {sizes}")
        try:
            self._product = getattr(torch.ops.aten, name).default
            matrix = torch.ones(_STEP, _STEP, dtype=torch.bfloat16)
            self(matrix[:1], self._format.pack(matrix), None)
        except (AttributeError, RuntimeError) as error:
            reason = f"torch {torch.__version__} has no {name} on this machine: {error}"
            raise NotImplementedError(reason) from error

    def pack(self, matrices: Any) -> list[tuple[Any, ...]]:
        """Quantize bf16 matrices [E, N, K], one at a time: on the way they are several times as large."""
        return [self._format.pack(matrix) for matrix in matrices]

    def __call__(self, x: Any, packed: tuple[Any, ...], bias: Any) -> Any:
        """Multiply rows [M, K], which must be contiguous."""
        y = self._product(x, *packed)
        return y if bias is None else y + bias
