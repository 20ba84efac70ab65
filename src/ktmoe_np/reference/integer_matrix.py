"""Weight matrices as integers that int8 activations are multiplied with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from .activation import round_bf16
from .quantized import check_member, num_groups, spread

__all__ = ["IntegerMatrix"]


@dataclass(frozen=True, eq=False)
class IntegerMatrix:
    """w = channel_scale * (scale * multiplier * code - minimum * minimum_multiplier).

    What is absent counts as 1, and minima as 0. `integer_product` defines the product with activations.

    Parameters
    ----------
    codes : ndarray of int8, [..., N, K]
    scale : ndarray of float32, [..., N, ceil(K / group_size)]
    group_size : int
        Columns that share a scale.
    multiplier : ndarray of int8, [..., N, ceil(K / multiplier_size)], optional
        Part of the integers of a product.
    minimum : ndarray of float32, [..., N, ceil(K / group_size)], optional
    minimum_multiplier : ndarray of int8, [..., N, ceil(K / multiplier_size)], optional
    multiplier_size : int, optional
        Columns that share multipliers.
    channel_scale : ndarray of float32, [..., N], optional
        Acts on the finished sums of a row.
    activation_block : int, optional
        Columns that share a scale of activations.

    Raises
    ------
    TypeError, ValueError
        Another dtype or shape; a size below 1.

    Examples
    --------
    >>> import numpy as np
    >>> codes, two, three = np.int8([[3, -2, 1]]), np.int8([[2, 5]]), np.float32([[3]])
    >>> matrix = IntegerMatrix(codes, three, 4, two, multiplier_size=2)
    >>> matrix.integers, matrix.values()
    (array([[ 6, -4,  5]], dtype=int32), array([[ 18., -12.,  15.]], dtype=float32))
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    group_size: int
    multiplier: NDArray[np.int8] | None = None
    minimum: NDArray[np.float32] | None = None
    minimum_multiplier: NDArray[np.int8] | None = None
    multiplier_size: int = 1
    channel_scale: NDArray[np.float32] | None = None
    activation_block: int = 128

    def __post_init__(self) -> None:
        for name in ("group_size", "multiplier_size", "activation_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        check_member("codes", self.codes, np.int8, None)
        *lead, num_columns = self.shape
        groups = (*lead, num_groups(num_columns, self.group_size))
        multipliers = (*lead, num_groups(num_columns, self.multiplier_size))
        check_member("scale", self.scale, np.float32, groups)
        for name, dtype, shape in (
            ("multiplier", np.int8, multipliers),
            ("minimum", np.float32, groups),
            ("minimum_multiplier", np.int8, multipliers),
            ("channel_scale", np.float32, tuple(lead)),
        ):
            if getattr(self, name) is not None:
                check_member(name, getattr(self, name), dtype, shape)
        if self.minimum is None and self.minimum_multiplier is not None:
            raise ValueError("minimum: got None, expected an array beside minimum_multiplier")

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K]."""
        return self.codes.shape

    @property
    def integers(self) -> NDArray[np.int32]:
        """What the codes of activations are multiplied with: multiplier * code, [..., N, K]."""
        products: NDArray[np.int32] = self.codes.astype(np.int32) * self._of_columns(self.multiplier)
        return products

    @property
    def minimum_integers(self) -> NDArray[np.int32]:
        """What they are multiplied with for the minimum: its multiplier or 1, [..., N, K]."""
        return np.broadcast_to(self._of_columns(self.minimum_multiplier), self.shape)

    def values(self, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """Compute the weights before the channel scale, [..., N, K], in float32 or float64."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            weights, minima = self._terms(dtype)
            return weights if minima is None else weights - minima

    def magnitudes(self) -> NDArray[np.float64]:
        """Compute what both terms of `values` add up to when no sign differs, [..., N, K]."""
        weights, minima = self._terms(np.float64)
        total: NDArray[np.float64] = np.abs(weights)
        return total if minima is None else total + np.abs(minima)

    def integer_magnitudes(self) -> NDArray[np.float64]:
        """The same of the integers, without scales."""
        integers: NDArray[np.float64] = np.abs(self.integers.astype(np.float64))
        if self.minimum is None:
            return integers
        both: NDArray[np.float64] = integers + np.abs(self.minimum_integers.astype(np.float64))
        return both

    def largest_scales(self) -> NDArray[np.float64]:
        """The largest magnitude among scales and minima, [..., N]."""
        largest = [
            np.abs(scale.astype(np.float64)).max(axis=-1, initial=0.0)
            for scale in (self.scale, self.minimum)
            if scale is not None
        ]
        return np.asarray(np.max(largest, axis=0))

    def _terms(self, dtype: DTypeLike) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Compute scale * multiplier * code, and minimum * minimum_multiplier."""

        def scaled(scale: NDArray[np.float32], integers: NDArray[np.int8] | None) -> NDArray[Any]:
            per_column: NDArray[Any] = spread(scale, self.group_size, self.shape[-1]).astype(dtype)
            return per_column if integers is None else per_column * self._of_columns(integers).astype(dtype)

        weights = scaled(self.scale, self.multiplier) * self.codes.astype(dtype)
        return weights, None if self.minimum is None else scaled(self.minimum, self.minimum_multiplier)

    def product_weights(self) -> NDArray[Any]:
        """Return what bfloat16 activations are multiplied with: bf(values), [..., N, K]."""
        return round_bf16(self.values()).astype(ml_dtypes.bfloat16)

    def __getitem__(self, at: Any) -> IntegerMatrix:
        """Index the axes before N and K."""
        members = {field.name: getattr(self, field.name) for field in fields(self)}
        return IntegerMatrix(
            **{
                name: member[at] if isinstance(member, np.ndarray) else member
                for name, member in members.items()
            }
        )

    def _of_columns(self, multiplier: NDArray[np.int8] | None) -> NDArray[np.int32]:
        """Multipliers of all columns as int32, or 1."""
        if multiplier is None:
            return np.ones((), np.int32)
        return spread(multiplier, self.multiplier_size, self.shape[-1]).astype(np.int32)
