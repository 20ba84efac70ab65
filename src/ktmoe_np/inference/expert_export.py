"""Writing the weights of single experts to buffers, cut for GPUs."""

from __future__ import annotations

from typing import Unpack

from ..arrays.types import ExpertArrays
from ..config import MoEConfig
from ..formats.methods import Method
from ..layers.base import MoELayer
from ..layers.options import LayerOptions
from .expert_buffers import ExpertBuffers

__all__ = ["ExpertExport"]


class ExpertExport(MoELayer):
    """A layer whose experts can be written to buffers."""

    def __init__(self, method: Method, config: MoEConfig, **layer: Unpack[LayerOptions]) -> None:
        super().__init__(method, config, **layer)
        self._expert_buffers = ExpertBuffers(self._layer, self.layer_idx, self.cpu_infer)

    def submit_write_weight_scale_to_buffer(
        self,
        gpu_tp_count: int,
        expert_id: int,
        w13_weights: ExpertArrays,
        w13_scales: ExpertArrays | None,
        w2_weights: ExpertArrays,
        w2_scales: ExpertArrays | None,
        *,
        w13_global_scales: ExpertArrays | None = None,
        w2_global_scales: ExpertArrays | None = None,
    ) -> None:
        """Begin to write an expert's weights to buffers, sliced for GPUs that share its intermediate size.

        With g GPUs, the slice of GPU i is i I / g to (i + 1) I / g of the intermediate size I: it takes these
        rows of gate, then these of up, and these columns of down. They are written in the encoding of
        the layer, each slice as a matrix: `load_weights_from_tensors` documents the codes and scales
        of a matrix. That is the checkpoint's encoding, but for ``GPTQ_INT4``, whose weights
        were converted to GGUF's blocks of Q4_0, for ``INT4_ZP``, whose weights were converted to blocks of
        their own (`ktmoe_np.formats.zero_points`), and for ``AMXINT8``, ``AMXINT4``, ``MOE_INT8`` and
        ``MOE_INT4``, whose weights were quantized (`ktmoe_np.reference.packing`). Biases are not written.

        Every buffer argument has g writable arrays in C order, from NumPy or another library on the CPU.
        Their dtype is free; the first axis counts the rows, and the size in bytes is that of so many rows.
        The engine keeps them alive until `sync_write_weight_scale_to_buffer`.

        Parameters
        ----------
        gpu_tp_count : int
            GPUs, g. Slices must not cut blocks of values, or columns or rows that share a scale.
        expert_id : int
            The expert as the layer counts, after a `physical_to_logical_map`.
        w13_weights : sequence of g arrays
            2 I / g rows, those of gate first; I / g when the activation is not gated.
        w13_scales : sequence of g arrays
            The scales of gate's rows and then of up's; a row of ``FP8`` serves 128 rows of the matrix. None
            when there are none or they are within the rows: ``BF16``, ``GPTQ_INT4``, ``INT4_ZP``,
            ``LLAMAFILE`` and ``MOE_INT8`` with a group size. The scales of ``FP8_PERCHANNEL`` and the
            quantized methods are one float32 per row.
        w2_weights : sequence of g arrays
            H rows of I / g columns.
        w2_scales : sequence of g arrays
            Likewise their scales; where a row has one scale, all H of them.
        w13_global_scales, w2_global_scales : sequence of g arrays, optional
            Required for encodings with a global scale: the float32 scale of the matrix, for each of its
            rows.

        Raises
        ------
        TypeError
            An argument of another kind, or an array with gaps or in another order.
        ValueError
            A `gpu_tp_count` that cuts what belongs together, gate and up in different formats, or buffers of
            another number or size, that overlap, or that the method has nothing for: named with what was
            expected.
        IndexError
            An expert that the layer does not have.
        RuntimeError
            Nothing is loaded, or buffers of this layer are being written.
        OSError
            A file of the weights was truncated; see `load_weights`.

        Examples
        --------
        >>> import ml_dtypes, numpy as np
        >>> from ktmoe_np import KTMoEWrapper
        >>> moe = KTMoEWrapper(layer_idx=0, num_experts=1, num_experts_per_tok=1, hidden_size=2,
        ...                    moe_intermediate_size=4)
        >>> gate = np.arange(8).reshape(1, 4, 2).astype(ml_dtypes.bfloat16)
        >>> down = np.arange(8).reshape(1, 2, 4).astype(ml_dtypes.bfloat16)
        >>> moe.load_weights_from_tensors(gate, -gate, down)
        >>> w13 = [np.empty((4, 2), ml_dtypes.bfloat16) for _ in range(2)]
        >>> w2 = [np.empty((2, 2), ml_dtypes.bfloat16) for _ in range(2)]
        >>> moe.submit_write_weight_scale_to_buffer(2, 0, w13, None, w2, None)
        >>> moe.sync_write_weight_scale_to_buffer()
        >>> w13[1].astype(int).tolist(), w2[1].astype(int).tolist()
        ([[4, 5], [6, 7], [-4, -5], [-6, -7]], [[2, 3], [6, 7]])
        """
        self._files.check()
        self._expert_buffers.submit(
            gpu_tp_count,
            expert_id,
            w13_weights=w13_weights,
            w13_scales=w13_scales,
            w2_weights=w2_weights,
            w2_scales=w2_scales,
            w13_global_scales=w13_global_scales,
            w2_global_scales=w2_global_scales,
        )

    def sync_write_weight_scale_to_buffer(self) -> None:
        """Wait until the buffers that were submitted have been written.

        Raises
        ------
        RuntimeError
            None were; or the layer was given weights of another format after they were.
        """
        self._expert_buffers.sync()
