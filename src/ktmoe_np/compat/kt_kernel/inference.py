"""Layers for inference, as kt-kernel's callers use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch

from ...inference.base import BaseMoEWrapper
from ...layers.quantized import QuantizedWeights
from .methods import INT8_METHODS
from .tensors import buffers_of, stream_of, tensor_of

__all__ = ["InferenceLayer"]


class InferenceLayer:
    """A layer of experts for inference. Made by `ktmoe_np.compat.kt_kernel.KTMoEWrapper`.

    Attributes
    ----------
    moe : BaseMoEWrapper
        The layer of this library, with all that it can do.
    gpu_experts_mask : tensor of bool [E]
        On the CPU. Changed in place, it counts from the next pass on.
    layer_idx, num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size : int
    weight_path, method, chunked_prefill_size, cpu_save, max_deferred_experts_per_token
        As given.
    """

    def __init__(
        self, moe: BaseMoEWrapper, method: str, gpu_experts_mask: torch.Tensor | None, cpu_save: bool
    ) -> None:
        config = moe.config
        self.moe = moe
        self.method = method
        self.layer_idx = config.layer_idx
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.hidden_size = config.hidden_size
        self.moe_intermediate_size = config.moe_intermediate_size
        self.weight_path = moe.weight_path
        self.chunked_prefill_size = moe.chunked_prefill_size
        self.max_deferred_experts_per_token = moe.max_deferred_experts_per_token
        self.cpu_infer = moe.cpu_infer
        self.cpu_save = bool(cpu_save)
        pinned = torch.cuda.is_available()
        self.gpu_experts_mask = torch.zeros(config.num_experts, dtype=torch.bool, pin_memory=pinned)
        if gpu_experts_mask is not None:
            self.gpu_experts_mask.copy_(_mask_of(gpu_experts_mask, config.num_experts))
        self._used_mask = torch.zeros_like(self.gpu_experts_mask)

    @property
    def num_gpu_experts(self) -> int:
        """How many experts the mask has."""
        return int(self.gpu_experts_mask.sum())

    # ---- weights ----

    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """Load the layer from `weight_path`; see `ktmoe_np.BaseMoEWrapper.load_weights`."""
        self.moe.load_weights(_map_of(physical_to_logical_map_cpu))

    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_to_logical_map_cpu: torch.Tensor | None = None,
    ) -> None:
        """Give the layer its weights.

        Parameters
        ----------
        gate_proj, up_proj : tensor [E, I, H]
        down_proj : tensor [E, H, I]
            Of the dtype that the method takes, bfloat16 with ``AMXINT4`` and others that quantize. Tensors
            that are not quantized stay in use.
        physical_to_logical_map_cpu : tensor of int64 [E], optional
            Expert i uses the weights of entry map[i].

        Raises
        ------
        TypeError, ValueError
            Another kind, dtype or shape, or pointers; with `cpu_save`, a method that does not quantize.
        """
        given = {"gate_proj": gate_proj, "up_proj": up_proj, "down_proj": down_proj}
        gate, up, down = (tensor_of(value, name).detach().cpu() for name, value in given.items())
        quantized = self.moe if isinstance(self.moe, QuantizedWeights) else None
        if self.cpu_save and (quantized is None or self.weight_path is None):
            raise ValueError(
                f"cpu_save: got True with {self.method}, expected False: only weights that the method "
                "quantizes are saved, to weight_path"
            )
        order = _map_of(physical_to_logical_map_cpu)
        self.moe.load_weights_from_tensors(gate, up, down, order)
        if self.cpu_save and quantized is not None:
            assert self.weight_path is not None
            quantized.save_weights(self.weight_path)

    # ---- passes ----

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: int | None = None,
    ) -> torch.Tensor:
        """The experts of the layer on a batch of tokens; see `ktmoe_np.BaseMoEWrapper.forward`.

        Parameters
        ----------
        hidden_states : tensor [B, H]
            On the CPU, or on a CUDA device: then the pass goes by the stream, which alone waits for it.
        topk_ids : tensor of integers [B, P]
        topk_weights : tensor of floats [B, P]
        cuda_stream : int, optional
            The handle of a stream. 0 is the device's default stream, and none for tensors on the CPU.

        Returns
        -------
        tensor [B, H]
            In bfloat16, on the device of the hidden states.
        """
        arrays, stream = self._arguments(hidden_states, topk_ids, topk_weights, cuda_stream)
        result: torch.Tensor = self.moe.forward(
            *arrays, cast(Any, stream), activation_dtype=self._activation_dtype
        )
        return result

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        cuda_stream: int | None = None,
    ) -> None:
        """Begin what `forward` does and return at once; `sync_forward` gives the result."""
        arrays, stream = self._arguments(hidden_states, topk_ids, topk_weights, cuda_stream)
        self.moe.submit_forward(*arrays, cast(Any, stream), activation_dtype=self._activation_dtype)

    def sync_forward(self, hidden_states: torch.Tensor, cuda_stream: int | None = None) -> torch.Tensor:
        """Wait for the pass that was submitted and give its result.

        Parameters
        ----------
        hidden_states : tensor
            Those of the pass: they tell the device.
        cuda_stream : int, optional
            That of the pass.
        """
        stream = stream_of(tensor_of(hidden_states, "hidden_states"), cuda_stream)
        return cast(torch.Tensor, self.moe.sync_forward(cuda_stream=cast(Any, stream)))

    def select_deferred_experts(
        self, expert_ids: torch.Tensor, expert_scores: torch.Tensor, protected_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Split slots in those that are computed now and those that may wait.

        Parameters
        ----------
        expert_ids : tensor of integers [B, P]
        expert_scores : tensor of floats [B, P]
        protected_k : int
            How many slots of each token, those with the largest scores, are computed now; a number out of
            range is taken as the nearest in range.

        Returns
        -------
        immediate_ids, deferred_ids : tensor [B, P]
            The ids, each with -1 where the other has the slot. Ties go to the lower slot.
        """
        protected = min(max(int(protected_k), 0), expert_ids.shape[-1])
        order = expert_scores.argsort(dim=-1, descending=True, stable=True)
        ranks = order.argsort(dim=-1)
        is_immediate = ranks < protected
        none = torch.full_like(expert_ids, -1)
        return torch.where(is_immediate, expert_ids, none), torch.where(is_immediate, none, expert_ids)

    # ---- experts for a GPU ----

    def submit_write_weight_scale_to_buffer(
        self,
        gpu_tp_count: int,
        expert_id: int,
        w13_weight_ptrs: Sequence[torch.Tensor],
        w13_scale_ptrs: Sequence[torch.Tensor] | None,
        w2_weight_ptrs: Sequence[torch.Tensor],
        w2_scale_ptrs: Sequence[torch.Tensor] | None,
    ) -> None:
        """Begin to write an expert's weights to buffers, sliced for GPUs.

        The buffers are tensors on the CPU, in place of kt-kernel's pointers; see
        `ktmoe_np.BaseMoEWrapper.submit_write_weight_scale_to_buffer` for their sizes.

        Raises
        ------
        TypeError
            Pointers.
        """
        w13, w2 = (
            cast(list[torch.Tensor], buffers_of(values, name))
            for values, name in ((w13_weight_ptrs, "w13_weight_ptrs"), (w2_weight_ptrs, "w2_weight_ptrs"))
        )
        self.moe.submit_write_weight_scale_to_buffer(
            gpu_tp_count,
            expert_id,
            w13,
            buffers_of(w13_scale_ptrs, "w13_scale_ptrs"),
            w2,
            buffers_of(w2_scale_ptrs, "w2_scale_ptrs"),
        )

    def sync_write_weight_scale_to_buffer(self) -> None:
        """Wait until the buffers have been written."""
        self.moe.sync_write_weight_scale_to_buffer()

    # ---- what passes share ----

    @property
    def _activation_dtype(self) -> Literal["int8"] | None:
        """What kt-kernel takes activations in; bfloat16 where the layer's weights have no other."""
        takes_int8 = self.method in INT8_METHODS and "int8" in self.moe.activation_dtypes
        return "int8" if takes_int8 else None

    def _arguments(
        self, hidden_states: object, topk_ids: object, topk_weights: object, cuda_stream: object
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], object]:
        arrays = (
            tensor_of(hidden_states, "hidden_states"),
            tensor_of(topk_ids, "topk_ids"),
            tensor_of(topk_weights, "topk_weights"),
        )
        stream = stream_of(arrays[0], cuda_stream)
        if not torch.equal(self.gpu_experts_mask, self._used_mask):
            self._used_mask.copy_(self.gpu_experts_mask)
            self.moe.set_gpu_experts_mask(self._used_mask.numpy())
        return arrays, stream


def _mask_of(mask: object, num_experts: int) -> torch.Tensor:
    found = tensor_of(mask, "gpu_experts_mask")
    if tuple(found.shape) != (num_experts,) or found.dtype is not torch.bool:
        raise ValueError(
            f"gpu_experts_mask: got {found.dtype} {list(found.shape)}, expected torch.bool [{num_experts}]"
        )
    return found


def _map_of(physical_to_logical_map: object) -> torch.Tensor | None:
    if physical_to_logical_map is None:
        return None
    return tensor_of(physical_to_logical_map, "physical_to_logical_map_cpu").cpu()
