"""The product of activations with the weights of one expert, in any form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .activation import Array, round_bf16
from .int8_activations import integer_product
from .integer_encodings import integers_of_quantized
from .integer_matrix import IntegerMatrix
from .quantize import quantize_activations
from .quantized import Int8GroupMatrix, QuantizedMatrix, ScaledMatrix, dequantize, product_weights

__all__ = ["ACTIVATION_DTYPES", "PRODUCTS", "ExpertWeights"]

#: What a product may be computed in.
PRODUCTS = ("bfloat16", "int8")

#: What activations may be multiplied as.
ACTIVATION_DTYPES = ("bfloat16", "int8")


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The weights [N, K] of one projection of one expert: `values`, times `channel_scale` if there is one."""

    values: NDArray[Any]  # [N, K]: numbers of bfloat16, or int8 codes
    channel_scale: NDArray[np.float32] | None = None  # [N]
    integer: bool = False  # activations become int8 codes too
    quantized: bool = False
    integers: IntegerMatrix | None = None  # forward products are with these, of activations in int8 blocks

    @classmethod
    def of(
        cls,
        matrix: QuantizedMatrix | IntegerMatrix,
        product: str,
        *,
        exact: bool,
        int8_activations: bool = False,
    ) -> ExpertWeights:
        """Take one matrix [N, K] for a product of `PRODUCTS`, or for an exact computation in float64.

        With `int8_activations`, those of the forward product are int8 in blocks, if the matrix has integers.
        """
        if exact:
            return cls(_exact(matrix), quantized=True)
        integers = _integers(matrix) if int8_activations else None
        if isinstance(matrix, IntegerMatrix):
            return cls(matrix.product_weights(), matrix.channel_scale, quantized=True, integers=integers)
        if isinstance(matrix, Int8GroupMatrix):
            return cls(product_weights(matrix), quantized=True, integers=integers)
        integer = product == "int8"
        return cls(matrix.codes, matrix.channel_scale, integer, quantized=True, integers=integers)

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K]."""
        return self.values.shape

    @property
    def sum_scale(self) -> NDArray[np.float32] | None:
        """The channel scale [N] that acts on the sums of the forward product."""
        return self.channel_scale if self.integers is None else self.integers.channel_scale

    def product(self, x: Array) -> Array:
        """Compute x . W^T in the dtype of x, [M, K] to [M, N]; the channel scale acts on the sums."""
        if self.integers is not None:
            return integer_product(x, self.integers)
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


def _integers(matrix: QuantizedMatrix | IntegerMatrix) -> IntegerMatrix | None:
    """The matrix as integers for activations in int8 blocks; None when it has none."""
    if isinstance(matrix, ScaledMatrix | IntegerMatrix):
        return matrix if isinstance(matrix, IntegerMatrix) else None
    return integers_of_quantized(matrix)


def _exact(matrix: QuantizedMatrix | IntegerMatrix) -> NDArray[np.float64]:
    """The weights in float64."""
    if not isinstance(matrix, IntegerMatrix):
        return dequantize(matrix, np.float64)
    values = matrix.values(np.float64)
    return values if matrix.channel_scale is None else values * matrix.channel_scale[..., None]
