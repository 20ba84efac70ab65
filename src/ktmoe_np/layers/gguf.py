"""Common to layers whose weights are GGUF blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..arrays.checks import Array, bfloat16, each_expert, numpy_if_given, numpy_matrices
from ..arrays.types import ArrayLike, ExpertArrays, IntegersLike
from ..formats.gguf import GGUF_FORMATS, PLAIN_DTYPES
from ..formats.weights import ExpertWeights, Projection
from ..io.converted.layer import projection_sizes
from ..io.gguf.experts import GgufCheckpoint, load_gguf
from .base import MoELayer
from .options import WeightSource

__all__ = ["GgufWeights"]

#: Dtypes that imply the tensor type.
_PLAIN = {dtype: name for name, dtype in PLAIN_DTYPES.items()}


class GgufWeights(MoELayer):
    """A layer whose weights stay in the encoding of a GGUF file; each projection has its own tensor type."""

    _formats: dict[str, str] | None = None  # of the projections, when loaded

    @property
    def formats(self) -> dict[str, str]:
        """The tensor type of each projection, in small letters.

        Raises
        ------
        RuntimeError
            Nothing is loaded: GGUF tensors carry their own type.
        """
        if self._formats is None:
            raise RuntimeError("formats: nothing is loaded, and GGUF tensors carry their own type")
        return dict(self._formats)

    @property
    def expert_bytes(self) -> int:
        """Bytes of the weights of one expert.

        Raises
        ------
        RuntimeError
            Nothing is loaded: GGUF tensors carry their own type.
        """
        if self._formats is None:
            raise RuntimeError("expert_bytes: nothing is loaded, and GGUF tensors carry their own type")
        sizes = projection_sizes(self.config)
        return sum(
            sizes[name][0] * GGUF_FORMATS[fmt].row_bytes(sizes[name][1])
            for name, fmt in self._formats.items()
        )

    def load_weights_from_tensors(  # type: ignore[override]  # its own options alone
        self,
        gate_proj: ExpertArrays,
        up_proj: ExpertArrays | None,
        down_proj: ExpertArrays,
        physical_to_logical_map: IntegersLike | None = None,
        *,
        gate_format: object = None,
        up_format: object = None,
        down_format: object = None,
        gate_bias: ArrayLike | None = None,
        up_bias: ArrayLike | None = None,
        down_bias: ArrayLike | None = None,
    ) -> None:
        """Give the layer its weights. They are kept alive, not copied: do not write to them afterwards.

        `ktmoe_np.reference.decode_gguf` defines the values of the bytes.

        Parameters
        ----------
        gate_proj, up_proj : array of uint8 [E, I, B], or E arrays
            Rows of B bytes, whole blocks of the format. float32, float16 and bfloat16 [E, I, H] are used
            directly. `up_proj` is None when the activation is not gated.
        down_proj : array of uint8 [E, H, B], or E arrays
        physical_to_logical_map : array of int64 [E], optional
            Expert i uses the weights of entry map[i].
        gate_format, up_format, down_format : str
            The tensor types, as GGUF names them, in any case: one of `ktmoe_np.formats.gguf.GGUF_FORMATS`;
            or members of ``gguf.GGMLQuantizationType``.
        gate_bias, up_bias : array of float32 or bfloat16 [E, I], optional
            Added before the activation. Copied, unlike the weights.
        down_bias : array of float32 or bfloat16 [E, H], optional
            Added before the routing weight is applied.

        Raises
        ------
        TypeError
            Not arrays, another dtype, or a last axis with gaps.
        ValueError
            Another format, another shape or number of arrays, rows that are not whole blocks, or an `up_proj`
            that the activation does not use.
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
        >>> moe = KTMoEWrapper(layer_idx=0, num_experts=1, num_experts_per_tok=1, hidden_size=32,
        ...                    moe_intermediate_size=32, activation="relu2", method="LLAMAFILE")
        >>> block = np.frombuffer(np.float16(0.25).tobytes() + bytes([0x99] * 16), np.uint8)  # of 0.25
        >>> rows = np.tile(block, (1, 32, 1))
        >>> moe.load_weights_from_tensors(rows, None, rows, gate_format="Q4_0", down_format="Q4_0")
        >>> x = np.ones((1, 32), ml_dtypes.bfloat16)
        >>> moe.forward(x, np.array([[0]]), np.array([[0.5]], np.float32))[0, :2].astype(float).tolist()
        [256.0, 256.0]
        """
        given = {
            "gate_proj": _given("gate", gate_proj, gate_bias, gate_format),
            "up_proj": _given("up", up_proj, up_bias, up_format),
            "down_proj": _given("down", down_proj, down_bias, down_format),
        }
        sizes = projection_sizes(self.config)
        projections = {
            name: self._as_the_engine_takes(name, p) if name in sizes else p for name, p in given.items()
        }
        self._give_to_engine(ExpertWeights.of(projections), physical_to_logical_map)
        self._formats = {name: str(projections[name].format) for name in sizes}

    def _as_the_engine_takes(self, name: str, given: Projection) -> Projection:
        """Rows as bytes or, for bf16, as numbers; and their format."""
        found = given.format

        def taken(array: Array, lead: tuple[int, ...]) -> Array:
            nonlocal found
            if found is None:
                found = _PLAIN.get(array.dtype)
            contiguous = array.ndim > 0 and array.strides[-1] == array.itemsize
            if found == _PLAIN.get(array.dtype) and found != "bf16" and contiguous:
                return array.view(np.uint8)
            if found == "bf16" and array.dtype == np.uint8 and contiguous and array.shape[-1] % 2 == 0:
                return array.view(bfloat16)
            return array

        codes = each_expert(name, given.codes, self.config.num_experts, taken)
        return replace(given, codes=codes, format=found)

    def _load_from_path(
        self, source: WeightSource, physical_to_logical_map: IntegersLike | None = None
    ) -> None:
        assert self.weight_path is not None
        self._gguf = GgufCheckpoint.shared(self.weight_path)  # other layers find its headers read
        experts = load_gguf(self._gguf, self.layer_idx, *source)
        arguments = experts.arguments()
        for name, projection in experts.projections.items():
            arguments[name.replace("_proj", "_format")] = projection.format
        self.load_weights_from_tensors(physical_to_logical_map=physical_to_logical_map, **arguments)


def _format_name(fmt: Any) -> str | None:
    """The name of a format as the engine knows it."""
    if fmt is None:
        return None
    return str(getattr(fmt, "name", fmt)).lower()


def _given(role: str, codes: Any, bias: Any, fmt: object) -> Projection:
    """A projection as the caller gives it, before anything is checked."""
    matrices, vectors = numpy_matrices(f"{role}_proj", codes), numpy_if_given(f"{role}_bias", bias)
    return Projection(matrices, bias=vectors, format=_format_name(fmt))
