"""Common to layers under kt-kernel's names, for inference and training: attributes, weights, buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch

from .. import kt_kernel_ext as ext
from ..arrays.types import PathLike
from ..buffers import KExpertsCPUBuffer
from ..inference.base import BaseMoEWrapper
from ..io.converted.layer import find_quantized
from ..layers.quantized import QuantizedWeights
from ..sft.base import BaseSFTMoEWrapper
from .arguments import as_tensor

__all__ = ["CompatLayer", "Wanted"]

#: What kt-kernel computes in integers although the method does not say so.
_INT8_METHODS = ("LLAMAFILE", "RAWINT4")

_NO_HOST_CALLBACKS = (
    "submit_forward and sync_forward: they go into CUDA graphs as they are, and there are no NPU streams"
)
_NO_FULL = "ktmoe_np.KTMoEWrapper with full_weight_grad=True, whose backward gives gradients of base weights"
_TENSORS = "load_weights_from_tensors of `layer`, which takes codes and scales"

#: Names of kt-kernel that do not exist here: what to use instead.
_REFUSED_NAMES = {
    "moe": "`layer`, the layer of this library: the extension's own object takes no pointers",
    "copy_inputs_to_cpu_buffers": _NO_HOST_CALLBACKS,
    "forward_on_pinned_buffers": _NO_HOST_CALLBACKS,
    "run_pinned_forward_sync": _NO_HOST_CALLBACKS,
    "copy_forward_output_to_device": _NO_HOST_CALLBACKS,
    "run_layerwise_fp8_batch": "submit_write_weight_scale_to_buffer for each expert, with tensors",
    "init_full_weight_grad_buffers": _NO_FULL,
    "update_base_weights": _NO_FULL,
    "load_rawint4_weights": _TENSORS,
    "load_block_fp8_weights": _TENSORS,
    "load_mxfp4_weights": _TENSORS,
    "save_backward_weights_from_tensors": "nothing: the backward pass reads the weights of the forward pass",
    "register_authoritative_optimizer_grad": "init_lora_weights, which takes parameters and their gradients",
    "cache_checkpoint_output": "recompute=True of ktmoe_np.KTMoEWrapper",
    "get_checkpoint_output": "recompute=True of ktmoe_np.KTMoEWrapper",
}


@dataclass(frozen=True)
class Wanted:
    """What the caller asked for, beside what the layer has."""

    method: str  #: by kt-kernel's name
    weight_path: PathLike | None
    chunked_prefill_size: int
    cpu_save: bool
    has_dtype: bool  #: whether an `activation_dtype` was given
    group_size: int
    zero_point: bool
    swiglu_limit: float
    swiglu_alpha: float


class CompatLayer:
    """A layer under kt-kernel's names. Made by `ktmoe_np.compat.kt_kernel.KTMoEWrapper`.

    Attributes
    ----------
    layer : BaseMoEWrapper or BaseSFTMoEWrapper
        The layer of this library, with all that this interface does not have.
    gpu_experts_mask : tensor of bool [E]
        On the CPU. Change it in place: every pass reads it when it is computed, a replayed CUDA graph too.
    """

    def __init__(self, layer: BaseMoEWrapper | BaseSFTMoEWrapper, mask: torch.Tensor, wanted: Wanted) -> None:
        self.layer = layer
        self.gpu_experts_mask = mask
        layer.gpu_experts_mask = mask.numpy()  # the same memory, which the engine reads in every pass
        c = layer.config
        self.layer_idx, self.num_experts, self.num_experts_per_tok = (
            c.layer_idx,
            c.num_experts,
            c.num_experts_per_tok,
        )
        self.hidden_size, self.moe_intermediate_size = c.hidden_size, c.moe_intermediate_size
        self.method, self.weight_path = wanted.method, wanted.weight_path
        self.chunked_prefill_size, self.cpu_save = wanted.chunked_prefill_size, wanted.cpu_save
        self.swiglu_limit, self.swiglu_alpha = wanted.swiglu_limit, wanted.swiglu_alpha
        self.group_size, self.zero_point = wanted.group_size, wanted.zero_point
        self._wants_int8 = wanted.method in _INT8_METHODS and not wanted.has_dtype
        self._takes_int8: bool | None = None  # None before it is known

    if not TYPE_CHECKING:  # to which unknown names are errors without it

        def __getattr__(self, name: str) -> NoReturn:
            if name in _REFUSED_NAMES:
                raise AttributeError(f"{name}: got a name of kt-kernel, expected {_REFUSED_NAMES[name]}")
            kind = type(self).__name__
            raise AttributeError(f"{name}: got an unknown name, expected one of {kind}, or of its `layer`")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.layer!r}>"

    @property
    def cpu_infer(self) -> ext.CPUInfer:
        """The engine."""
        return self.layer.cpu_infer

    @property
    def num_gpu_experts(self) -> int:
        """How many experts `gpu_experts_mask` names."""
        return int(self.gpu_experts_mask.sum())

    @property
    def activation_dtype(self) -> str:
        """What products take activations in: ``bfloat16`` or ``int8``; known when weights are loaded."""
        return self._dtype or self.layer.activation_dtype

    @property
    def _dtype(self) -> Literal["int8"] | None:
        """What calls ask for; None for what is the layer's own."""
        if not self._wants_int8:
            return None
        if self._takes_int8 is None and self.layer.loaded:
            self._takes_int8 = "int8" in self.layer.activation_dtypes
        return "int8" if self._takes_int8 else None

    # ---- weights ----

    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """Load the layer from `weight_path`; with `cpu_save`, also write what was quantized to there.

        Does nothing when it is loaded already.

        Parameters
        ----------
        physical_to_logical_map_cpu : tensor of integers [E], optional
            On the CPU. Expert i uses the weights of the checkpoint's expert map[i].

        Raises
        ------
        Exception
            What `load_weights` of `layer` raises.
        """
        if self.layer.loaded:
            return
        logical = self._logical(physical_to_logical_map_cpu)
        saves = self.cpu_save and not self._is_saved()
        self.layer.load_weights(logical)
        self._has_weights(saves)

    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_to_logical_map_cpu: torch.Tensor | None = None,
    ) -> None:
        """Give the layer its weights; with `cpu_save`, also write what was quantized to `weight_path`.

        Parameters
        ----------
        gate_proj, up_proj : tensor of bfloat16, float32 or float16 [E, I, H]
        down_proj : tensor of bfloat16, float32 or float16 [E, H, I]
            On the CPU. Methods that quantize read them; ``BF16`` computes with them where they are. Methods
            with scales take them from `weight_path`, or by ``layer.load_weights_from_tensors``.
        physical_to_logical_map_cpu : tensor of integers [E], optional

        Raises
        ------
        Exception
            What `load_weights_from_tensors` of `layer` raises.
        """
        logical = self._logical(physical_to_logical_map_cpu)
        given = {"gate_proj": gate_proj, "up_proj": up_proj, "down_proj": down_proj}
        gate, up, down = (as_tensor(name, tensor).contiguous() for name, tensor in given.items())
        self.layer.load_weights_from_tensors(gate, up, down, logical)
        self._has_weights(self.cpu_save)

    def _logical(self, physical_to_logical_map: Any) -> torch.Tensor | None:
        """The map as the layer takes it."""
        if physical_to_logical_map is None:
            return None
        return as_tensor("physical_to_logical_map_cpu", physical_to_logical_map).contiguous()

    def _is_saved(self) -> bool:
        """Whether `weight_path` has quantized weights of the layer already."""
        return (
            self.weight_path is not None
            and find_quantized(Path(self.weight_path), self.layer_idx) is not None
        )

    def _has_weights(self, saves: bool) -> None:
        """What follows from weights that have just come."""
        if saves:
            assert isinstance(self.layer, QuantizedWeights)
            assert self.weight_path is not None
            self.layer.save_weights(self.weight_path)
        self._takes_int8 = None

    # ---- buffers ----

    @staticmethod
    def set_capture_batch_sizes(capture_bs: Sequence[int]) -> None:
        """See `ktmoe_np.KExpertsCPUBuffer.set_capture_batch_sizes`."""
        KExpertsCPUBuffer.set_capture_batch_sizes(capture_bs)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """See `ktmoe_np.KExpertsCPUBuffer.get_capture_batch_sizes`."""
        return KExpertsCPUBuffer.get_capture_batch_sizes()

    @staticmethod
    def clear_buffer_cache() -> None:
        """See `ktmoe_np.KExpertsCPUBuffer.clear_buffer_cache`."""
        KExpertsCPUBuffer.clear_buffer_cache()
