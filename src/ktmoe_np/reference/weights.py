"""The product of activations with the weights of one expert, in any form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .activation import Array, round_bf16
from .quantize import quantize_activations
from .quantized import Int8GroupMatrix, QuantizedMatrix, dequantize, product_weights

__all__ = ["PRODUCTS", "ExpertWeights"]

#: What a product may be computed in.
PRODUCTS = ("bfloat16", "int8")


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The weights [N, K] of one projection of one expert: `values`, times `channel_scale` if there is one."""

    values: NDArray[Any]  # [N, K]: numbers of bfloat16, or int8 codes
    channel_scale: NDArray[np.float32] | None = None  # [N]
    integer: bool = False  # activations become int8 codes too
    quantized: bool = False

    @classmethod
    def of(cls, matrix: QuantizedMatrix, product: str, *, exact: bool) -> ExpertWeights:
        """Take one matrix [N, K] for a product of `PRODUCTS`, or for an exact computation in float64."""
        if exact:
            return cls(dequantize(matrix, np.float64), quantized=True)
        if isinstance(matrix, Int8GroupMatrix):
            return cls(product_weights(matrix), quantized=True)
        return cls(matrix.codes, matrix.channel_scale, integer=product == "int8", quantized=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K]."""
        return self.values.shape

    def product(self, x: Array) -> Array:
        """Compute x . W^T in the dtype of x, [M, K] to [M, N]; the channel scale acts on the sums."""
        total: Array = self._integer_sums(x) if self.integer else x @ self.values.astype(x.dtype).T
        return total if self.channel_scale is None else total * self.channel_scale.astype(x.dtype)

    def _integer_sums(self, x: Array) -> Array:
        """Multiply the codes of x; their sums are exact, then rounded once, then scaled by the row of x."""
        codes, scale = quantize_activations(x)
        # The sums are integers below 2^53, exact in float64.
        sums = codes.astype(np.float64) @ self.values.astype(np.float64).T
        scaled: Array = sums.astype(x.dtype) * scale.astype(x.dtype)[:, None]
        return scaled

    def backward(self, dtype: np.dtype[Any]) -> Array:
        """Return the weights [N, K] that gradients go through: of codes, bf(code * channel_scale)."""
        if self.channel_scale is None:
            return self.values.astype(dtype)
        return round_bf16(self.values.astype(np.float32) * self.channel_scale[:, None]).astype(dtype)
