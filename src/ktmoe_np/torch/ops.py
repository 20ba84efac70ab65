"""The operators of torch: their implementations, what they give in traces, and the derivative.

An operator knows a layer by its number. Shapes and dtypes are checked where it runs, as the engine does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from ..arrays.host import as_numpy
from ..config import ActivationDtype
from ..inference.base import BaseMoEWrapper
from ..layers.base import LAYERS
from ..sft.base import BaseSFTMoEWrapper
from ..sft.gradients import lora_shapes
from ..sft.numbered import NumberedBatch, check_adapters, numbered_backward, numbered_forward
from .streams import backward_in_stream, forward_in_stream, gradients_like, stream_of

__all__ = ["forward_op", "sft_op"]


def _training(number: int) -> BaseSFTMoEWrapper:
    layer = LAYERS.at(number)
    assert isinstance(layer, BaseSFTMoEWrapper)
    return layer


# ---- inference ----


@torch.library.custom_op("ktmoe_np::moe_forward", mutates_args=())
def forward_op(
    layer: int,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    activation_dtype: str | None,
) -> torch.Tensor:
    """The experts of a layer for inference."""
    moe = LAYERS.at(layer)
    assert isinstance(moe, BaseMoEWrapper)
    arrays = hidden_states.detach(), topk_ids, topk_weights.detach()
    dtype = _named(activation_dtype)
    stream = stream_of(hidden_states)
    if stream is None:
        return moe.forward(*arrays, activation_dtype=dtype)
    found: torch.Tensor = moe.forward(*arrays, stream, activation_dtype=dtype)
    return found


@forward_op.register_fake
def _(
    layer: int, hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, dtype: str | None
) -> torch.Tensor:
    return torch.empty_like(hidden_states)


# ---- training ----


@torch.library.custom_op("ktmoe_np::moe_sft", mutates_args=())
def sft_op(
    layer: int,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    lora: Sequence[torch.Tensor],
    save: bool,
    activation_dtype: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of a layer with adapters: the output, and the number of the pass, 0 if it is not saved."""
    sft = _training(layer)
    if stream_of(hidden_states) is not None:
        arrays = hidden_states, topk_ids, topk_weights, list(lora)
        return forward_in_stream(sft, *arrays, save, _named(activation_dtype))
    batch = _batch(sft, hidden_states, topk_ids, topk_weights, lora, activation_dtype)
    out = torch.empty(hidden_states.shape, dtype=torch.bfloat16)
    return out, torch.tensor(numbered_forward(sft, batch, as_numpy(out, "out"), save))


@sft_op.register_fake
def _(
    layer: int,
    hidden_states: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    lora: Sequence[torch.Tensor],
    save: bool,
    dtype: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(hidden_states), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("ktmoe_np::moe_sft_backward", mutates_args=())
def _backward_op(
    layer: int,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    lora: Sequence[torch.Tensor],
    number: torch.Tensor,
    grad_output: torch.Tensor,
    with_lora: bool,
    activation_dtype: str | None,
) -> list[torch.Tensor]:
    """The gradients of the input, of the routing weights and, on request, of the adapters, float32."""
    sft, pass_number = _training(layer), int(number)
    grad_output = grad_output.contiguous()
    if stream_of(hidden_states) is not None:
        arrays = hidden_states, topk_ids, topk_weights, list(lora)
        return backward_in_stream(sft, *arrays, pass_number, grad_output, with_lora, _named(activation_dtype))
    batch = _batch(sft, hidden_states, topk_ids, topk_weights, lora, activation_dtype)
    results = gradients_like(hidden_states, topk_weights, list(lora) if with_lora else [])
    grad_x, grad_w, *grad_lora = (as_numpy(each, "gradient") for each in results)
    matrices = dict(zip(batch.lora, grad_lora, strict=False))
    grad = as_numpy(grad_output, "grad_output")
    numbered_backward(sft, batch, pass_number, grad, (grad_x, grad_w), matrices)
    return results


@_backward_op.register_fake
def _(
    layer: int,
    hidden_states: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    lora: Sequence[torch.Tensor],
    number: torch.Tensor,
    grad_output: torch.Tensor,
    with_lora: bool,
    dtype: str | None,
) -> list[torch.Tensor]:
    return gradients_like(hidden_states, weights, list(lora) if with_lora else [])


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    layer, hidden_states, ids, weights, lora, _, dtype = inputs
    ctx.layer, ctx.num_lora, ctx.activation_dtype = layer, len(lora), dtype
    ctx.save_for_backward(hidden_states, ids, weights, output[1], *lora)


def _go_back(ctx: Any, grad_output: torch.Tensor, _: Any) -> tuple[Any, ...]:
    hidden_states, ids, weights, number, *lora = ctx.saved_tensors
    wants = ctx.needs_input_grad
    with_lora = any(wants[4]) if isinstance(wants[4], list | tuple) else bool(wants[4])
    grad_x, grad_w, *grad_lora = _backward_op(
        ctx.layer, hidden_states, ids, weights, lora, number, grad_output, with_lora, ctx.activation_dtype
    )
    by_lora: list[torch.Tensor | None] = [
        found.to(given.dtype) for found, given in zip(grad_lora, lora, strict=False)
    ] or [None] * len(lora)
    return None, grad_x, None, grad_w, by_lora, None, None


sft_op.register_autograd(_go_back, setup_context=_save_inputs)


def _batch(
    sft: BaseSFTMoEWrapper,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    lora: Sequence[torch.Tensor],
    activation_dtype: str | None,
) -> NumberedBatch:
    """The arrays of a pass on the CPU."""
    config, rank = sft.config, sft.options.lora_rank
    names = lora_shapes(config, rank)
    matrices = {name: as_numpy(each, name) for name, each in zip(names, lora, strict=True)}
    check_adapters(matrices, config, rank)
    return NumberedBatch(
        as_numpy(hidden_states, "hidden_states"),
        as_numpy(topk_ids, "topk_ids"),
        as_numpy(topk_weights, "topk_weights"),
        matrices,
        _named(activation_dtype),
    )


def _named(activation_dtype: str | None) -> ActivationDtype | None:
    """A name that calls have checked; operators take strings."""
    return cast(ActivationDtype | None, activation_dtype)
