"""Common to layers with weights in their checkpoint's encoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..arrays.checks import numpy_if_given, numpy_matrices
from ..arrays.types import ArrayLike, ExpertArrays, IntegersLike
from ..formats.encodings import NATIVE_FORMATS
from ..formats.gguf import GGUF_FORMATS
from ..formats.methods import Method
from ..formats.numbers import number_rows
from ..formats.weights import ExpertWeights, Projection
from ..io import SafetensorsCheckpoint
from ..io.converted.layer import check_not_quantized, projection_sizes
from ..io.mapped import MappedFiles
from ..io.native import load_native
from .base import MoELayer
from .options import WeightSource

__all__ = ["NativeWeights"]


#: What a projection is given as: the ends of the names of arguments, and what views them.
_PARTS: tuple[tuple[str, Callable[[str, Any], Any]], ...] = (
    ("proj", numpy_matrices),
    ("scale", numpy_matrices),
    ("global_scale", numpy_if_given),
    ("zero", numpy_matrices),
    ("bias", numpy_if_given),
)


class NativeWeights(MoELayer):
    """A layer whose weights stay in the checkpoint's encoding: arrays stay the caller's, files stay mapped.

    An encoding whose rows are not contiguous is converted, once.
    """

    def _set_method(self, method: Method) -> None:
        super()._set_method(method)
        name = method.weights if self.group_size is None else method.encodings[self.group_size]
        self._format = NATIVE_FORMATS.get(name)  # None: plain numbers
        self._number_formats: dict[str, str | None] = {}  # of projections in other numbers than bfloat16

    @property
    def expert_bytes(self) -> int:
        """Bytes of the weights of one expert, scales included; of numbers not loaded yet, as bfloat16."""
        sizes = projection_sizes(self.config)
        if self._format is None:
            formats = {name: GGUF_FORMATS[self._number_formats.get(name) or "bf16"] for name in sizes}
            return sum(rows * formats[name].row_bytes(columns) for name, (rows, columns) in sizes.items())
        return sum(self._format.matrix_bytes(*size) for size in sizes.values())

    def load_weights_from_tensors(  # type: ignore[override]  # its own options alone
        self,
        gate_proj: ExpertArrays,
        up_proj: ExpertArrays | None,
        down_proj: ExpertArrays,
        physical_to_logical_map: IntegersLike | None = None,
        *,
        gate_scale: ExpertArrays | None = None,
        up_scale: ExpertArrays | None = None,
        down_scale: ExpertArrays | None = None,
        gate_global_scale: ArrayLike | None = None,
        up_global_scale: ArrayLike | None = None,
        down_global_scale: ArrayLike | None = None,
        gate_zero: ExpertArrays | None = None,
        up_zero: ExpertArrays | None = None,
        down_zero: ExpertArrays | None = None,
        gate_bias: ArrayLike | None = None,
        up_bias: ArrayLike | None = None,
        down_bias: ArrayLike | None = None,
    ) -> None:
        """Give the layer its weights. They are kept alive, not copied: do not write to them afterwards.

        Those of ``GPTQ_INT4`` and ``INT4_ZP`` are converted instead, once, to rows with the same weights to
        the bit; the given arrays are released.

        With [N, K] being [I, H] of gate and up and [H, I] of down, E of each in one array or a sequence,
        ``BF16`` takes bfloat16, float32 or float16 [N, K], each projection in its own dtype; products round
        float32 and float16 to bfloat16. The codes and scales of another method are those of its
        `ktmoe_np.formats.encodings.NativeFormat`: `code_dtypes` and `row_bytes`, `scale_dtypes` and
        `scale_shape`; docs/registry.md has a table of them.

        ``INT4_ZP`` takes rows of nibbles q, uint8 [N, K / 2], the low one of a byte first, scales in float16
        [N, G] and zero points z, uint8 [N, G] up to 31, for weights (q - z) * scale. K and the size of groups
        are multiples of the layer's `group_size`.

        float8_e4m3fn may be given as uint8. `ktmoe_np.reference` defines their values (``decode_fp8`` and
        similar functions). With ``GPTQ_INT4``, K is a multiple of 32 and weights are symmetric in groups of
        neighbors; the group size is a power of two from 32 on, or K. Scales in bfloat16 must be numbers that
        float16 has.

        Parameters
        ----------
        gate_proj, up_proj, down_proj : array, or E arrays
            `up_proj` is None when the activation is not gated. Rows may be strided, the last axis must be
            contiguous.
        physical_to_logical_map : array of int64 [E], optional
            Expert i uses the weights of entry map[i].
        gate_scale, up_scale, down_scale : array, or E arrays
            None with ``BF16``.
        gate_global_scale, up_global_scale, down_global_scale : array of float32 [E]
            Of encodings that have one: what all of a matrix is multiplied by.
        gate_zero, up_zero, down_zero : array of uint8, or E arrays
            Of encodings that have zero points.
        gate_bias, up_bias : array of float32 or bfloat16 [E, I], optional
            Added before the activation. Copied, unlike the weights.
        down_bias : array of float32 or bfloat16 [E, H], optional
            Added before the routing weight is applied.

        Raises
        ------
        TypeError
            Not arrays, another dtype, or a last axis with gaps.
        ValueError
            Another shape or number of arrays, or an `up_proj` that the activation does not use. Of
            ``GPTQ_INT4``: sizes that are no multiples of 32, or a scale that float16 does not have.
        IndexError
            An entry of the map outside 0 to E - 1.
        RuntimeError
            Of a layer for training: saved forward passes wait for their backward pass.
        OSError
            A mapped file of the arrays was truncated.

        Examples
        --------
        >>> import ml_dtypes, numpy as np
        >>> from ktmoe_np import KTMoEWrapper
        >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
        ...                    moe_intermediate_size=2, activation="relu2", method="FP8")
        >>> gate, down = (np.ones(shape, ml_dtypes.float8_e4m3fn) for shape in ((2, 2, 4), (2, 4, 2)))
        >>> scale = np.ones((2, 1, 1), np.float32)
        >>> moe.load_weights_from_tensors(gate, None, down, gate_scale=scale, down_scale=scale)
        >>> x = np.ones((1, 4), ml_dtypes.bfloat16)
        >>> moe.forward(x, np.array([[1]]), np.array([[0.5]], np.float32)).astype(float).tolist()
        [[16.0, 16.0, 16.0, 16.0]]
        """
        arguments = {
            "gate": (gate_proj, gate_scale, gate_global_scale, gate_zero, gate_bias),
            "up": (up_proj, up_scale, up_global_scale, up_zero, up_bias),
            "down": (down_proj, down_scale, down_global_scale, down_zero, down_bias),
        }
        given = {
            role: [view(f"{role}_{part}", one) for (part, view), one in zip(_PARTS, arrays, strict=True)]
            for role, arrays in arguments.items()
        }
        MappedFiles(array for arrays in given.values() for array in arrays[:4]).check()
        projections = {f"{role}_proj": self._projection(role, *arrays) for role, arrays in given.items()}
        self._give_to_engine(ExpertWeights.of(projections), physical_to_logical_map)
        if self._format is None:
            self._number_formats = {name: projection.format for name, projection in projections.items()}

    def _projection(
        self, role: str, codes: Any, scale: Any, global_scale: Any, zero: Any, bias: Any
    ) -> Projection:
        """A projection as the engine takes it."""
        size = projection_sizes(self.config).get(f"{role}_proj")
        for part, value in (("scale", scale), ("global_scale", global_scale), ("zero", zero)):
            what = f"{role}_{part}"
            if value is not None and (self._format is None or size is None):
                why = "the activation is not gated" if size is None else "bfloat16 weights have no scales"
                raise ValueError(f"{what}: got one, expected None: {why}")
        if size is None:
            return Projection(codes, bias=bias)
        shape = (self.config.num_experts, *size)
        if self._format is None:
            return replace(number_rows(f"{role}_proj", codes, shape), bias=bias)
        return replace(self._format.matrices(role, codes, scale, global_scale, shape, zero), bias=bias)

    def _load_from_path(
        self, source: WeightSource, physical_to_logical_map: IntegersLike | None = None
    ) -> None:
        assert self.weight_path is not None
        check_not_quantized(self.weight_path, self.method)
        if self._format is None:
            self._load_from_checkpoint(source, physical_to_logical_map)
            return
        self._checkpoint = SafetensorsCheckpoint.shared(self.weight_path)
        experts = load_native(
            self._checkpoint, self.layer_idx, source.config, self._format.method, source.experts
        )
        if not self._has_groups_of(experts.group_size):
            raise ValueError(
                f"{self._checkpoint.path}: the experts of layer {self.layer_idx}: got {experts.method} in "
                f"groups of {experts.group_size}, expected groups of {self.group_size}: make the layer with "
                f"group_size={experts.group_size}"
            )
        arguments = experts.arguments()
        for name, projection in experts.projections.items():
            role = name.removesuffix("_proj")
            arguments[f"{role}_scale"] = projection.scales
            arguments[f"{role}_global_scale"] = projection.global_scale
            arguments[f"{role}_zero"] = projection.zero_points
        self.load_weights_from_tensors(physical_to_logical_map=physical_to_logical_map, **arguments)

    def _has_groups_of(self, size: int | None) -> bool:
        """Whether the layer can hold groups of that size: its own, or several of those it converts to."""
        if self.group_size is None or size is None or self._format is None:
            return True
        return size % self.group_size == 0 if self._format.is_converted else size == self.group_size
