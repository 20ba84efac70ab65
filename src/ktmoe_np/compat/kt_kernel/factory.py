"""What programs import from kt-kernel: the factory of layers, and masks of experts on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from ...arrays.checks import integer
from ...buffers import KExpertsSFTBuffer
from ...experts import KTMoEWrapper as MainWrapper
from ...gpu.masks import generate_gpu_experts_masks as main_masks
from .inference import InferenceLayer
from .methods import activation_of, main_method
from .training import TrainingLayer

__all__ = ["KTMoEWrapper", "generate_gpu_experts_masks"]


def generate_gpu_experts_masks(activation_freq: torch.Tensor, num_gpu_experts: int) -> torch.Tensor:
    """Mask of the most frequently routed experts of a model, over all its layers.

    Parameters
    ----------
    activation_freq : tensor of numbers [L, E]
        On any device.
    num_gpu_experts : int
        How many experts to choose, over all layers; a number out of range is taken as the nearest in range.

    Returns
    -------
    tensor of bool [L, E]
        On the CPU; ties go to the lower layer, then to the lower expert.

    Raises
    ------
    TypeError, ValueError
        Frequencies that are not real numbers of two axes, or a NaN.
    """
    freq = activation_freq.detach().cpu()
    num = min(max(integer("num_gpu_experts", num_gpu_experts), 0), freq.numel())
    return torch.from_numpy(main_masks(freq.float() if freq.is_floating_point() else freq, num))


class KTMoEWrapper:
    """Make a layer of experts, with kt-kernel's parameters in their order.

    Parameters
    ----------
    layer_idx, num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size : int
        See `ktmoe_np.KTMoEWrapper`.
    gpu_experts_mask : tensor of bool [E], or None
        Copied to the attribute of that name, a tensor on the CPU that may be changed in place.
    cpuinfer_threads, threadpool_count : int
        Threads and sub-pools of the engine.
    weight_path : str
        What `load_weights` reads.
    chunked_prefill_size : int
        Tokens that are computed at a time. Larger batches are computed in chunks.
    cpu_save : bool
        Write the weights that `load_weights_from_tensors` has quantized to `weight_path`.
    max_deferred_experts_per_token : int, optional
        None is 0.
    method : str
        kt-kernel's name; `ktmoe_np.compat.kt_kernel.methods` says what each is called here.
    numa_nodes : sequence of int, optional
        None is the nodes of the machine in turn.
    mode : str
        ``inference`` or ``sft``.
    num_gpu_experts : int
        Of mode ``sft``: the first experts, which are computed elsewhere.
    lora_rank, lora_alpha, lora_dropout, max_cache_depth, full_weight_grad
        Of mode ``sft``; see `ktmoe_np.sft.SFTOptions`.
    group_size, zero_point
        Of the method ``AMXINT4_KGroup_SFT``, which has no zero points here.
    swiglu_limit, swiglu_alpha : float
        Limit and alpha of the activation; 0 is none. With an alpha it is gpt-oss's and MiniMax-M3's.

    Returns
    -------
    InferenceLayer, or TrainingLayer with ``mode="sft"``

    Raises
    ------
    ValueError
        A mode or a method that is not known or not here, and the reason; or invalid sizes.
    """

    @overload
    def __new__(  # type: ignore[misc]  # a factory: layers are of the mode's class
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: torch.Tensor | None,
        cpuinfer_threads: int,
        threadpool_count: int,
        weight_path: str,
        chunked_prefill_size: int,
        cpu_save: bool = ...,
        max_deferred_experts_per_token: int | None = ...,
        method: str = ...,
        numa_nodes: Sequence[int] | None = ...,
        mode: Literal["inference"] = ...,
        *,
        swiglu_limit: float = ...,
        swiglu_alpha: float = ...,
    ) -> InferenceLayer: ...

    @overload
    def __new__(  # type: ignore[misc]
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: torch.Tensor | None = ...,
        cpuinfer_threads: int = ...,
        threadpool_count: int = ...,
        weight_path: str = ...,
        chunked_prefill_size: int = ...,
        cpu_save: bool = ...,
        max_deferred_experts_per_token: int | None = ...,
        method: str = ...,
        numa_nodes: Sequence[int] | None = ...,
        *,
        mode: Literal["sft"],
        num_gpu_experts: int = ...,
        lora_rank: int = ...,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        max_cache_depth: int = ...,
        group_size: int = ...,
        zero_point: bool = ...,
        full_weight_grad: bool = ...,
        swiglu_limit: float = ...,
        swiglu_alpha: float = ...,
    ) -> TrainingLayer: ...

    def __new__(
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: torch.Tensor | None = None,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        weight_path: str | None = None,
        chunked_prefill_size: int = 4096,
        cpu_save: bool = False,
        max_deferred_experts_per_token: int | None = None,
        method: str = "AMXINT4",
        numa_nodes: Sequence[int] | None = None,
        mode: str = "inference",
        num_gpu_experts: int = 0,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        max_cache_depth: int = 1,
        group_size: int = 128,
        zero_point: bool = True,
        full_weight_grad: bool = False,
        swiglu_limit: float = 0.0,
        swiglu_alpha: float = 0.0,
    ) -> Any:
        """Make the layer; see the class."""
        name, groups = main_method(method, mode, group_size, zero_point)
        options: dict[str, Any] = {
            "layer_idx": layer_idx,
            "num_experts": num_experts,
            "num_experts_per_tok": num_experts_per_tok,
            "hidden_size": hidden_size,
            "moe_intermediate_size": moe_intermediate_size,
            "cpuinfer_threads": cpuinfer_threads,
            "threadpool_count": threadpool_count,
            "weight_path": weight_path or None,
            "numa_nodes": numa_nodes,
            "group_size": groups,
            "activation": activation_of(swiglu_limit, swiglu_alpha),
            "method": name,
        }
        if mode == "sft":
            lora: dict[str, Any] = {
                "lora_rank": lora_rank,
                "lora_alpha": lora_alpha,
                "lora_dropout": lora_dropout,
                "max_cache_depth": max_cache_depth,
                "full_weight_grad": full_weight_grad,
            }
            trained = MainWrapper(**{**options, **lora}, mode="sft")
            return TrainingLayer(trained, method, num_gpu_experts, chunked_prefill_size)
        deferred = 0 if max_deferred_experts_per_token is None else int(max_deferred_experts_per_token)
        moe = MainWrapper(
            **options, chunked_prefill_size=chunked_prefill_size, max_deferred_experts_per_token=deferred
        )
        return InferenceLayer(moe, method, gpu_experts_mask, cpu_save)

    @staticmethod
    def set_capture_batch_sizes(capture_bs: list[int]) -> None:
        """Keep buffers of these batch sizes; see `ktmoe_np.KExpertsCPUBuffer`."""
        MainWrapper.set_capture_batch_sizes(capture_bs)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """Those batch sizes."""
        return MainWrapper.get_capture_batch_sizes()

    @staticmethod
    def clear_buffer_cache() -> None:
        """Release the buffers of inference that are not in use."""
        MainWrapper.clear_buffer_cache()

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        """Release the buffers of training that are not in use."""
        KExpertsSFTBuffer.clear_buffer_cache()
