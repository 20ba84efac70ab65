"""kt-kernel's Python interface: `KTMoEWrapper` and `generate_gpu_experts_masks`, on torch tensors.

A program imports them from here instead of from ``kt_kernel``. ``docs/from-kt-kernel.md`` says what differs.

Examples
--------
>>> import torch
>>> moe = KTMoEWrapper(0, 2, 1, 4, 2, None, None, None, None, 512, method="BF16")
>>> gate, down = torch.ones(2, 2, 4, dtype=torch.bfloat16), torch.ones(2, 4, 2, dtype=torch.bfloat16)
>>> moe.load_weights_from_tensors(gate, gate, down, torch.arange(2))
>>> x = torch.ones(1, 4, dtype=torch.bfloat16)
>>> moe.submit_forward(x, torch.tensor([[1]]), torch.ones(1, 1), 0)
>>> moe.sync_forward(x, 0).tolist()
[[31.375, 31.375, 31.375, 31.375]]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from ..arrays.checks import as_numpy, at_least, integer
from ..arrays.types import PathLike
from ..buffers import KExpertsCPUBuffer, KExpertsSFTBuffer
from ..config import ActivationDtype
from ..experts import KTMoEWrapper as _Factory
from ..gpu.masks import generate_gpu_experts_masks as _masks
from .arguments import activation_of, as_tensor, gpu_mask, group_size_of, method_of
from .base import Wanted
from .inference import InferenceExperts
from .training import TrainingExperts

__all__ = ["InferenceExperts", "KTMoEWrapper", "TrainingExperts", "generate_gpu_experts_masks"]


class KTMoEWrapper:
    """Make the wrapper of one layer of experts, by kt-kernel's arguments.

    Parameters
    ----------
    layer_idx, num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size : int
        Layer, E, P, H and I.
    gpu_experts_mask : tensor of bool [E], optional
        Experts that are computed elsewhere. Copied to the wrapper's ``gpu_experts_mask``, which may be
        changed in place.
    cpuinfer_threads, threadpool_count : int, optional
        Of the engine; see `ktmoe_np.KTMoEWrapper`.
    weight_path : str or path-like, optional
        What `load_weights` reads, and where `cpu_save` writes to.
    chunked_prefill_size : int
        Inference: tokens computed per chunk; batches may be larger.
    cpu_save : bool
        Write the weights that were quantized to `weight_path`, in files of this library.
    max_deferred_experts_per_token : int, optional
        Inference: experts per token whose result may be added to the next layer's output; at most P.
    method : str
        kt-kernel's name, or one of this library.
    numa_nodes : sequence of int, optional
    mode : str
        ``inference`` or ``sft``.
    num_gpu_experts : int
        Without a mask, the first so many experts are computed elsewhere.
    lora_rank, lora_alpha, lora_dropout, max_cache_depth
        Of mode ``sft``; see `ktmoe_np.sft.SFTOptions`.
    group_size, zero_point
        Of the methods with ``KGroup`` in their name, as in kt-kernel; others do not look at them.
    full_weight_grad : bool
        False; gradients of base weights are those of `ktmoe_np.KTMoEWrapper`.
    swiglu_limit, swiglu_alpha : float
        Of any method. Both 0: silu(gate) * up. A limit alone clamps gate and up before it; an alpha chooses
        gate * sigmoid(alpha * gate) * (up + 1), with the clamp if there is a limit.
    activation_dtype : {"bfloat16", "int8"} or dtype, optional
        Not of kt-kernel. By default what kt-kernel computes: int8 for ``LLAMAFILE`` and ``RAWINT4`` in mode
        ``inference``, where the weights are integers; else the method's own.

    Raises
    ------
    ValueError
        An unknown method or mode, a value out of range, or one that this library has no equal of.
    TypeError
        An argument of another type, such as an address.
    RuntimeError
        The arguments need another engine than the existing one.

    Examples
    --------
    >>> mask = torch.tensor([True, False, False, False])
    >>> moe = KTMoEWrapper(3, 4, 2, 64, 32, mask, None, None, None, 512, method="AMXINT8")
    >>> type(moe).__name__, moe.num_gpu_experts, moe.method
    ('InferenceExperts', 1, 'AMXINT8')
    >>> sft = KTMoEWrapper(3, 4, 2, 64, 32, None, None, None, None, 512, method="AMXBF16_SFT", mode="sft")
    >>> type(sft).__name__, sft.lora_scaling
    ('TrainingExperts', 2.0)
    """

    @overload
    def __new__(  # type: ignore[misc]  # a factory
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: torch.Tensor | None = ...,
        cpuinfer_threads: int | None = ...,
        threadpool_count: int | None = ...,
        weight_path: PathLike | None = ...,
        chunked_prefill_size: int = ...,
        cpu_save: bool = ...,
        max_deferred_experts_per_token: int | None = ...,
        method: str = ...,
        numa_nodes: Sequence[int] | None = ...,
        mode: Literal["inference"] = ...,
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
        *,
        activation_dtype: ActivationDtype | None = ...,
    ) -> InferenceExperts: ...

    @overload
    def __new__(  # type: ignore[misc]
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: torch.Tensor | None = ...,
        cpuinfer_threads: int | None = ...,
        threadpool_count: int | None = ...,
        weight_path: PathLike | None = ...,
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
        activation_dtype: ActivationDtype | None = ...,
    ) -> TrainingExperts: ...

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
        weight_path: PathLike | None = None,
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
        *,
        activation_dtype: ActivationDtype | None = None,
    ) -> Any:
        """Make the wrapper; see the class."""
        found, path = method_of(method, mode), weight_path or None
        _check_can_save(cpu_save, method, bool(found.formats), path)
        options: dict[str, Any] = {
            "method": found.name,
            "mode": mode,
            "cpuinfer_threads": cpuinfer_threads,
            "threadpool_count": threadpool_count,
            "weight_path": path,
            "numa_nodes": numa_nodes,
            "activation": activation_of(swiglu_limit, swiglu_alpha),
            "group_size": group_size_of(method, found, group_size, zero_point, path, layer_idx),
            "activation_dtype": activation_dtype,
        }
        chunk_size = at_least("chunked_prefill_size", chunked_prefill_size, 1)
        if mode == "inference":
            deferred = at_least("max_deferred_experts_per_token", max_deferred_experts_per_token or 0, 0)
            slots = at_least("num_experts_per_tok", num_experts_per_tok, 1)
            options["max_deferred_experts_per_token"] = min(deferred, slots)
            options["chunked_prefill_size"] = chunk_size
        else:
            _check_trains_adapters(lora_rank, full_weight_grad)
            options |= {"lora_rank": lora_rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
            options["max_cache_depth"] = max_cache_depth
        sizes = (num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size)
        layer: Any = _Factory(layer_idx, *sizes, **options)
        mask = gpu_mask(gpu_experts_mask, num_gpu_experts, num_experts)
        wanted = Wanted(
            method=method,
            weight_path=path,
            chunked_prefill_size=chunk_size,
            cpu_save=bool(cpu_save),
            has_dtype=activation_dtype is not None or mode == "sft",
            group_size=group_size,
            zero_point=zero_point,
            swiglu_limit=float(swiglu_limit),
            swiglu_alpha=float(swiglu_alpha),
        )
        return (InferenceExperts if mode == "inference" else TrainingExperts)(layer, mask, wanted)

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

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        """See `ktmoe_np.KExpertsSFTBuffer.clear_buffer_cache`."""
        KExpertsSFTBuffer.clear_buffer_cache()


def generate_gpu_experts_masks(activation_freq: torch.Tensor, num_gpu_experts: int) -> torch.Tensor:
    """Mask of the most frequently routed experts of a model, over all its layers.

    Parameters
    ----------
    activation_freq : tensor of numbers [L, E]
        How often each expert of each layer is routed to; on any device.
    num_gpu_experts : int
        How many experts to choose, over all layers together: a number below 0 is 0, one above L E is L E.

    Returns
    -------
    tensor of bool [L, E]
        On the CPU. Ties go to the lower layer, then to the lower expert.

    Raises
    ------
    TypeError
        No tensor of real numbers, or a number of experts that is no integer.
    ValueError
        Not two axes, or a NaN.

    Examples
    --------
    >>> generate_gpu_experts_masks(torch.tensor([[5.0, 1.0, 3.0], [4.0, 9.0, 0.0]]), 3).tolist()
    [[True, False, False], [True, True, False]]
    >>> int(generate_gpu_experts_masks(torch.ones(2, 3), 100).sum())
    6
    """
    freq = as_tensor("activation_freq", activation_freq).cpu()
    freq = freq.double() if freq.is_floating_point() else freq
    count = min(max(integer("num_gpu_experts", num_gpu_experts), 0), freq.numel())
    return torch.from_numpy(_masks(as_numpy(freq, "activation_freq"), count))


def _check_can_save(cpu_save: object, method: str, quantizes: bool, weight_path: PathLike | None) -> None:
    """Raise ValueError for weights that cannot be written."""
    if cpu_save and not quantizes:
        expected = "expected False: only weights that are quantized at load are saved"
        raise ValueError(f"cpu_save: got True with method {method!r}, {expected}")
    if cpu_save and weight_path is None:
        raise ValueError("weight_path: got None with cpu_save=True, expected a directory to write to")


def _check_trains_adapters(lora_rank: int, full_weight_grad: object) -> None:
    """Raise for training without adapters, or with gradients of base weights."""
    at_least("lora_rank", lora_rank, 1)
    if full_weight_grad:
        raise ValueError(
            "full_weight_grad: got True, expected False: gradients of base weights are those of "
            "ktmoe_np.KTMoEWrapper"
        )
