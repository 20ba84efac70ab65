"""The weights of a layer's experts in any encoding, as loaders return and layers take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..arrays.summary import arrays_summary, object_summary
from ..arrays.types import Array

__all__ = ["ExpertWeights", "Matrices", "Projection"]

#: One array for all experts, or a sequence of E arrays.
Matrices: TypeAlias = Array | Sequence[Array]


@dataclass(frozen=True, eq=False, repr=False)
class Projection:
    """The matrices [N, K] of a projection: one array for all experts, or a sequence of E arrays.

    Parameters
    ----------
    codes : array or sequence of arrays
        Numbers [E, N, K], or rows of codes, uint8 [E, N, row_bytes].
    block_scales : array or sequence of arrays, optional
        Scales of blocks or groups of codes, separate from the codes, [E, rows, columns].
    channel_scale : array or sequence of arrays, optional
        float32 [E, N]: one scale per row.
    global_scale : array, optional
        float32 [E]: one scale per matrix.
    zero_points : array or sequence of arrays, optional
        uint8 [E, N, G]: one per group of codes, subtracted from these.
    bias : array, optional
        float32 or bfloat16 [E, N].
    format : str, optional
        For projections with their own formats: a name in `ktmoe_np.formats.gguf`.
    """

    codes: Matrices
    block_scales: Matrices | None = None
    channel_scale: Matrices | None = None
    global_scale: Array | None = None
    zero_points: Matrices | None = None
    bias: Array | None = None
    format: str | None = None

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        arrays = {name: value for name, value in vars(self).items() if name != "format"}
        return f"{self.format or ''} {arrays_summary(arrays)}"

    @property
    def scales(self) -> Matrices | None:
        """The scales that go with the codes in a checkpoint: per block or per row."""
        return self.channel_scale if self.block_scales is None else self.block_scales

    def select(self, experts: Sequence[int]) -> Projection:
        """The projection of these experts, in this order: views, but for its global scale and bias.

        Examples
        --------
        >>> import numpy as np
        >>> some = Projection(np.arange(6).reshape(3, 2, 1), bias=np.arange(6).reshape(3, 2)).select([2, 0])
        >>> [matrix.tolist() for matrix in some.codes], some.bias.tolist()
        ([[[4], [5]], [[0], [1]]], [[4, 5], [0, 1]])
        """
        rows = list(experts)
        return Projection(
            [self.codes[e] for e in rows],
            _views(self.block_scales, rows),
            _views(self.channel_scale, rows),
            None if self.global_scale is None else self.global_scale[rows],
            _views(self.zero_points, rows),
            None if self.bias is None else self.bias[rows],
            self.format,
        )


def _views(matrices: Matrices | None, experts: Sequence[int]) -> list[Array] | None:
    return None if matrices is None else [matrices[e] for e in experts]


@dataclass(frozen=True, eq=False, repr=False)
class ExpertWeights:
    """The experts of a layer, in the order of the checkpoint, or those that were chosen, in that order.

    Parameters
    ----------
    gate : Projection
        [I, H]; of experts that are not gated, their one projection.
    up : Projection, optional
        [I, H]; None when the activation is not gated.
    down : Projection
        [H, I].
    names : tuple of str, optional
        The tensors that the weights were made of.
    method : str, optional
        The method for inference that reads them in place.
    group_size : int, optional
        Columns that share a scale, where the method leaves a choice.
    """

    gate: Projection
    up: Projection | None
    down: Projection
    names: tuple[str, ...] = ()
    method: str | None = None
    group_size: int | None = None

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        codes = {name: projection.codes for name, projection in self.projections.items()}
        return f"{self.method or ''} {arrays_summary(codes)}"

    @classmethod
    def of(
        cls,
        projections: Mapping[str, Projection],
        names: tuple[str, ...] = (),
        method: str | None = None,
        group_size: int | None = None,
    ) -> ExpertWeights:
        """Make them of projections by name: gate_proj, up_proj when gated, down_proj.

        Examples
        --------
        >>> weights = ExpertWeights.of({"gate_proj": Projection([1]), "down_proj": Projection([2])})
        >>> weights.up, list(weights.projections)
        (None, ['gate_proj', 'down_proj'])
        """
        gate, up, down = projections["gate_proj"], projections.get("up_proj"), projections["down_proj"]
        return cls(gate, up, down, names, method, group_size)

    def select(self, experts: Sequence[int]) -> ExpertWeights:
        """The weights of these experts, in this order: see `Projection.select`. The names stay."""
        chosen = {name: projection.select(experts) for name, projection in self.projections.items()}
        return ExpertWeights.of(chosen, self.names, self.method, self.group_size)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.down.codes)

    @property
    def projections(self) -> dict[str, Projection]:
        """The projections that there are, by name."""
        found = {"gate_proj": self.gate, "up_proj": self.up, "down_proj": self.down}
        return {name: projection for name, projection in found.items() if projection is not None}

    @property
    def biases(self) -> dict[str, Any]:
        """The biases that there are, by the name of their projection."""
        return {name: p.bias for name, p in self.projections.items() if p.bias is not None}

    def arguments(self) -> dict[str, Any]:
        """The codes and biases by the names of arguments, gate_proj and so on; None where there are none.

        Examples
        --------
        >>> weights = ExpertWeights(Projection([1], bias=[2]), None, Projection([3]))
        >>> weights.arguments()["gate_bias"], weights.arguments()["up_proj"], len(weights.arguments())
        ([2], None, 6)
        """
        return {**self._codes(), **self.bias_arguments()}

    def bias_arguments(self) -> dict[str, Any]:
        """The biases by the names of arguments, None where there are none."""
        return {f"{role}_bias": self.biases.get(f"{role}_proj") for role in ("gate", "up", "down")}

    def _codes(self) -> dict[str, Any]:
        return {"up_proj": None, **{name: p.codes for name, p in self.projections.items()}}
