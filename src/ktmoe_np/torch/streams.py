"""Tensors of a CUDA device: passes go by the current stream of torch, which alone waits for them."""

from __future__ import annotations

import torch

from ..arrays.device import DeviceArray, device_array
from ..arrays.spec import ArraySpec
from ..config import ActivationDtype
from ..sft.base import BaseSFTMoEWrapper
from ..sft.gradients import lora_shapes
from ..sft.stream import DeviceBatch, stream_backward, stream_forward

__all__ = ["backward_in_stream", "forward_in_stream", "gradients_like", "stream_of"]

_ANY = ArraySpec((), ("...",))


def stream_of(tensor: torch.Tensor) -> torch.cuda.Stream | None:
    """The stream that work on a tensor goes into; None on the CPU.

    Raises
    ------
    NotImplementedError
        Another device.
    """
    if tensor.is_cpu:
        return None
    if not tensor.is_cuda:
        raise NotImplementedError(f"hidden_states: got a tensor on {tensor.device}, expected cpu or cuda")
    return torch.cuda.current_stream(tensor.device)


def gradients_like(
    hidden_states: torch.Tensor, topk_weights: torch.Tensor, lora: list[torch.Tensor]
) -> list[torch.Tensor]:
    """New tensors for gradients of the input, the routing weights and adapters, as the engine writes them."""
    rows = [each.new_empty(each.shape) for each in (hidden_states, topk_weights)]
    return rows + [each.new_empty(each.shape, dtype=torch.float32) for each in lora]


def forward_in_stream(
    sft: BaseSFTMoEWrapper,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    lora: list[torch.Tensor],
    save: bool,
    activation_dtype: ActivationDtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of a pass, and its number, on the CPU."""
    stream = torch.cuda.current_stream(hidden_states.device).cuda_stream
    batch = _batch(sft, stream, hidden_states, topk_ids, topk_weights, lora, activation_dtype)
    out = hidden_states.new_empty(hidden_states.shape)
    number = stream_forward(sft, stream, batch, device_array(out, "out", _ANY, stream), save)
    return out, torch.tensor(number)


def backward_in_stream(
    sft: BaseSFTMoEWrapper,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    lora: list[torch.Tensor],
    number: int,
    grad_output: torch.Tensor,
    with_lora: bool,
    activation_dtype: ActivationDtype | None,
) -> list[torch.Tensor]:
    """The gradients of the input, of the routing weights and, on request, of the adapters, float32."""
    stream = torch.cuda.current_stream(hidden_states.device).cuda_stream
    batch = _batch(sft, stream, hidden_states, topk_ids, topk_weights, lora, activation_dtype)
    results = gradients_like(hidden_states, topk_weights, lora if with_lora else [])
    written = [device_array(each, "gradient", _ANY, stream) for each in results]
    grad = device_array(grad_output, "grad_output", _ANY, stream)
    stream_backward(sft, stream, batch, number, grad, written)
    return results


def _batch(
    sft: BaseSFTMoEWrapper,
    stream: int,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    lora: list[torch.Tensor],
    activation_dtype: ActivationDtype | None,
) -> DeviceBatch:
    """The arrays of a pass on the device; calls have made their dtypes and shapes what they must be."""

    def on_device(tensor: torch.Tensor, name: str) -> DeviceArray:
        return device_array(tensor, name, _ANY, stream)

    names = lora_shapes(sft.config, sft.options.lora_rank)
    return DeviceBatch(
        on_device(hidden_states, "hidden_states"),
        on_device(topk_ids, "topk_ids"),
        on_device(topk_weights, "topk_weights"),
        {name: on_device(each, name) for name, each in zip(names, lora, strict=True)},
        activation_dtype,
    )
