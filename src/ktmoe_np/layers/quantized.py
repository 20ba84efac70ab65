"""Common to layers of quantized experts: quantizing, loading and saving."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..arrays.types import ArrayLike, ExpertArrays, IntegersLike
from ..formats.methods import Method
from ..formats.quantized import FORMATS
from ..formats.weights import ExpertWeights
from ..io.converted.layer import (
    find_quantized,
    load_quantized,
    projection_sizes,
    save_quantized,
)
from ..io.mapped import MappedFiles
from .base import MoELayer
from .options import WeightSource
from .quantize_task import quantize_projection
from .quantized_arrays import (
    are_codes,
    check_only_used,
    checked_biases,
    checked_map,
    given_projection,
    viewed_matrices,
)

__all__ = ["QuantizedWeights"]

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class QuantizedWeights(MoELayer):
    """A layer whose weights are integers and scales, quantized at load or before.

    `ktmoe_np.reference.quantize_int8` and `quantize_int4` define the integers, to the bit; `pack_int8` and
    `pack_int4` their bytes in memory and in files.

    Attributes
    ----------
    group_size : int or None
        Columns of a row that share a scale; None when the row has one scale.
    """

    def _set_method(self, method: Method) -> None:
        super()._set_method(method)
        self._format = FORMATS[method.formats[self.group_size]]
        self._experts: ExpertWeights | None = None

    @property
    def expert_bytes(self) -> int:
        """Bytes of the weights of one expert, scales included."""
        scale = 4 if self._format.has_channel_scale else 0
        sizes = projection_sizes(self.config).values()
        return sum(rows * (self._format.row_bytes(columns) + scale) for rows, columns in sizes)

    # ---- loading ----

    def load_weights(
        self,
        physical_to_logical_map: IntegersLike | None = None,
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Load the layer from `weight_path`. Does nothing when it is loaded already.

        Files that `save_weights` or ``ktmoe convert`` have written are mapped, not copied. Weights of a
        Hugging Face checkpoint are quantized.

        Parameters
        ----------
        physical_to_logical_map : array of int64 [E], optional
            Expert i uses the weights of the checkpoint's expert map[i].
        progress : callable, optional
            See `load_weights_from_tensors`.

        Raises
        ------
        RuntimeError
            The layer was made without a `weight_path`.
        FileNotFoundError, ValueError
            The checkpoint is not there, does not have this layer, or is of another method: names the file,
            and the field or tensor, what came and what was expected.
        """
        if self._may_load():
            self._load_from_path(WeightSource(self.config), physical_to_logical_map, progress)

    def _load_from_path(
        self,
        source: WeightSource,
        physical_to_logical_map: IntegersLike | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        assert self.weight_path is not None
        file = find_quantized(self.weight_path, self.layer_idx)
        if file is not None:
            logical = checked_map(physical_to_logical_map, self.config.num_experts)
            self._give(load_quantized(file, source.config, self._format, source.experts), logical)
            return
        self._load_from_checkpoint(source, physical_to_logical_map, progress=progress)

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
        gate_bias: ArrayLike | None = None,
        up_bias: ArrayLike | None = None,
        down_bias: ArrayLike | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Give the layer its weights: to be quantized, one expert after the other, or quantized already.

        Parameters
        ----------
        gate_proj, up_proj : array of bfloat16, float32 or float16 [E, I, H], or E arrays [I, H]
            Read, and released. Or uint8 [E, I, row_bytes], or E arrays [I, row_bytes], in the layout of
            `ktmoe_np.reference.packing`: these are kept alive, not copied, and their codes are not checked.
            `up_proj` is None when the activation is not gated.
        down_proj : array of bfloat16, float32 or float16 [E, H, I], or E arrays [H, I]
            Or uint8 [E, H, row_bytes], or E arrays [H, row_bytes].
        physical_to_logical_map : array of int64 [E], optional
            Expert i uses the weights of entry map[i].
        gate_scale, up_scale : array of float32 [E, I], or E arrays [I]
            Channel scales of quantized weights, kept alive; None when the rows contain the scales
            (``MOE_INT8`` with a group size).
        down_scale : array of float32 [E, H], or E arrays [H]
        gate_bias, up_bias : array of float32 or bfloat16 [E, I], optional
            Added before the activation. Copied.
        down_bias : array of float32 or bfloat16 [E, H], optional
            Added before the routing weight is applied.
        progress : callable, optional
            Called with (matrices that are quantized, matrices to quantize) after each one.

        Raises
        ------
        TypeError
            Not arrays, or another dtype.
        ValueError
            Another shape or number of arrays; weights or scales that are not finite: names the projection,
            the expert and the row; scales without quantized weights or the other way round; an `up_proj`
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
        >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
        ...                    moe_intermediate_size=2, activation="relu2", method="MOE_INT8")
        >>> gate, down = np.ones((2, 2, 4), np.float32), np.ones((2, 4, 2), np.float32)
        >>> moe.load_weights_from_tensors(gate, None, down)
        >>> x = np.ones((1, 4), ml_dtypes.bfloat16)
        >>> moe.forward(x, np.array([[1]]), np.array([[0.5]], np.float32)).astype(float).tolist()
        [[16.0, 16.0, 16.0, 16.0]]
        """
        num_experts, sizes = self.config.num_experts, projection_sizes(self.config)
        given_sources = zip(_PROJECTIONS, (gate_proj, up_proj, down_proj), strict=True)
        sources = {name: viewed_matrices(name, source) for name, source in given_sources}
        scales = dict(zip(_PROJECTIONS, (gate_scale, up_scale, down_scale), strict=True))
        biases = dict(zip(_PROJECTIONS, (gate_bias, up_bias, down_bias), strict=True))
        MappedFiles([*sources.values(), *scales.values(), *biases.values()]).check()
        check_only_used(sources, scales, sizes)
        physical_to_logical_map = checked_map(physical_to_logical_map, num_experts)
        given = checked_biases(biases, num_experts, {name: size[0] for name, size in sizes.items()})
        projections = {
            name: given_projection(self._format, name, sources[name], scales[name], (num_experts, *size))
            for name, size in sizes.items()
            if are_codes(sources[name])
        }
        total, num_done = num_experts * (len(sizes) - len(projections)), 0

        def tell() -> None:
            nonlocal num_done
            num_done += 1
            if progress is not None:
                progress(num_done, total)

        for name, size in sizes.items():
            if name not in projections:
                shape = (num_experts, *size)
                projections[name] = quantize_projection(
                    self.cpu_infer, self._format, name, sources[name], shape, tell
                )
        biased = {name: replace(p, bias=given.get(name)) for name, p in projections.items()}
        self._give(ExpertWeights.of(biased), physical_to_logical_map)

    def _give(self, experts: ExpertWeights, physical_to_logical_map: IntegersLike | None) -> None:
        """Give the layer codes and scales."""
        self._give_to_engine(experts, physical_to_logical_map)
        self._experts = None if self._spans_nodes() else experts

    # ---- saving ----

    def save_weights(self, directory: str | os.PathLike[str]) -> Path:
        """Write the quantized weights to a file of their own, for `weight_path`.

        The bytes do not depend on the machine, its instruction sets or the number of threads. Experts are in
        the order in which they were given, before `physical_to_logical_map`.

        Parameters
        ----------
        directory : str or path-like
            Made when it is not there. A file of this layer is replaced, all at once.

        Returns
        -------
        Path
            The file, ``layer-00012.safetensors``.

        Raises
        ------
        RuntimeError
            Nothing is loaded, or the weights are spread over NUMA nodes.
        OSError
            The file cannot be written, or a file of the weights was truncated.
        """
        if not self.loaded:
            raise RuntimeError("save_weights: no weights are loaded; call load_weights first")
        if self._experts is None:
            raise RuntimeError(
                "save_weights: every NUMA node has its own rows of the weights, none has all of them; "
                "save them with threadpool_count=1, or use the command 'ktmoe convert'"
            )
        return save_quantized(directory, self._experts, self.config, self._format)
