"""Passes of layers on tensors: those that are differentiated, and those that are not.

What a trace of torch sees here is tensors, and numbers and sizes of the layer, which are constants to it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..arrays.host import giver_of
from ..arrays.rows import HIDDEN_DTYPES
from ..config import ActivationDtype, MoEConfig, activation_dtype_name
from ..inference.base import BaseMoEWrapper
from ..sft.base import BaseSFTMoEWrapper
from ..sft.gradients import LORA_NAMES
from ..sft.numbered import ADAPTER_DTYPES, check_lora
from .ops import forward_op, sft_op

__all__ = ["check_nothing_deferred", "lora_parameters", "moe_forward", "moe_sft"]

_HIDDEN = tuple(getattr(torch, dtype.name) for dtype in HIDDEN_DTYPES)
_ADAPTERS = tuple(getattr(torch, dtype.name) for dtype in ADAPTER_DTYPES)


def moe_forward(
    moe: BaseMoEWrapper,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    activation_dtype: ActivationDtype | None = None,
) -> torch.Tensor:
    """The experts of a layer on a batch of tokens, bit-identical to `BaseMoEWrapper.forward`.

    One operator of torch, so `torch.compile` has no reason to break a graph. On a CUDA device the pass goes
    by the current stream, which alone waits for it.

    Parameters
    ----------
    moe : BaseMoEWrapper
        Of mode ``inference``, loaded.
    hidden_states : tensor of bfloat16, float32 or float16 [..., H]
        On the CPU or a CUDA device; all leading axes count as rows. Rounded to bfloat16 once.
    topk_ids : tensor of integers [..., P]
        Negative ids are skipped.
    topk_weights : tensor of floats [..., P]
        Used in float32.
    activation_dtype : {"bfloat16", "int8"} or dtype, optional
        What products take activations in, for this call; None for the layer's own.

    Returns
    -------
    tensor of bfloat16 [..., H]

    Raises
    ------
    TypeError, ValueError
        An argument of another kind, dtype or shape. Also tensors that require grad, while grad mode is on:
        `moe_sft` has a derivative. Also a layer that defers experts: the next call would have to add them.
    IndexError
        An expert id of E or above; on a CUDA device the result is NaN, and a later call raises it.
    RuntimeError
        Nothing is loaded.

    Examples
    --------
    >>> import ml_dtypes, numpy as np, torch
    >>> from ktmoe_np import KTMoEWrapper
    >>> moe = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2")
    >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
    >>> moe.load_weights_from_tensors(gate, None, down)
    >>> moe_forward(moe, torch.ones(1, 3, 4), torch.zeros(1, 3, 1, dtype=int), torch.ones(1, 3, 1))[0, 0]
    tensor([32., 32., 32., 32.], dtype=torch.bfloat16)
    """
    if not isinstance(moe, BaseMoEWrapper):
        raise TypeError(f"moe: got {type(moe).__name__}, expected a BaseMoEWrapper, of mode 'inference'")
    check_nothing_deferred(moe)
    x, ids, weights = _rows(moe.config, hidden_states, topk_ids, topk_weights)
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        raise TypeError(
            "moe_forward: got tensors that require grad, expected none: moe_sft has a derivative, with a "
            "layer of mode 'sft', and this call may be made within torch.no_grad()"
        )
    out: torch.Tensor = forward_op(moe.number, x, ids, weights, activation_dtype_name(activation_dtype))
    return out.reshape(hidden_states.shape)


def moe_sft(
    sft: BaseSFTMoEWrapper,
    lora: Mapping[str, torch.Tensor],
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    activation_dtype: ActivationDtype | None = None,
) -> torch.Tensor:
    """The experts of a layer with adapters, differentiable by these, the input and the routing weights.

    One operator of torch, for autograd, `torch.compile` and checkpoints. The adapters that the layer's own
    passes compute with, and its saved pass, become those of the last call: a layer that is called here should
    be called only here. What the layer saves and exports stays what it was given; `MoEExperts.update_layer`
    gives it the adapters of a module. A backward
    pass uses the saved forward pass if that is the layer's last, and repeats it bit-identically otherwise:
    for passes that go back in another order, with ``retain_graph``, or in several graphs. A graph does not
    keep the layer alive.

    Parameters
    ----------
    sft : BaseSFTMoEWrapper
        Of mode ``sft``, loaded, without dropout.
    lora : mapping of str to tensor of float32, bfloat16 or float16
        The adapters, under the names and in the shapes of `BaseSFTMoEWrapper.lora_weights`;
        `lora_parameters` gives first ones. Computed with as bfloat16; on the device of the hidden states.
    hidden_states, topk_ids, topk_weights, activation_dtype
        See `moe_forward`.

    Returns
    -------
    tensor of bfloat16 [..., H]

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `moe_forward`; also for adapters that are missing, or a layer with dropout.

    Examples
    --------
    >>> import ml_dtypes, numpy as np, torch
    >>> from ktmoe_np import KTMoEWrapper
    >>> sft = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2", mode="sft",
    ...                    method="AMXBF16_SFT", lora_rank=1)
    >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
    >>> sft.load_weights_from_tensors(gate, None, down)
    >>> lora, x = lora_parameters(sft), torch.ones(3, 4, requires_grad=True)
    >>> y = moe_sft(sft, lora, x, torch.zeros(3, 1, dtype=int), torch.ones(3, 1))
    >>> y.float().sum().backward()
    >>> x.grad[0], lora["gate_lora_b"].grad.shape
    (tensor([64., 64., 64., 64.]), torch.Size([2, 2, 1]))
    """
    if not isinstance(sft, BaseSFTMoEWrapper):
        raise TypeError(f"sft: got {type(sft).__name__}, expected a BaseSFTMoEWrapper, of mode 'sft'")
    config, options = sft.config, sft.options
    check_lora(lora, config, options.lora_rank, options.lora_dropout, "an autograd graph")
    x, ids, weights = _rows(config, hidden_states, topk_ids, topk_weights)
    adapters = [_adapter(name, lora[name], x.device) for name in LORA_NAMES if name in lora]
    save = torch.is_grad_enabled() and any(each.requires_grad for each in (x, weights, *adapters))
    dtype = activation_dtype_name(activation_dtype)
    out: torch.Tensor = sft_op(sft.number, x, ids, weights, adapters, save, dtype)[0]
    return out.reshape(hidden_states.shape)


def check_nothing_deferred(moe: BaseMoEWrapper) -> None:
    """Refuse a layer whose calls leave experts over for the next one, which an operator must not.

    Raises
    ------
    ValueError
        `max_deferred_experts_per_token` is not 0.
    """
    deferred = moe.max_deferred_experts_per_token
    if deferred:
        raise ValueError(f"moe: got max_deferred_experts_per_token {deferred}, expected 0 under torch")


def lora_parameters(sft: BaseSFTMoEWrapper) -> dict[str, torch.nn.Parameter]:
    """Copy the adapters of a layer to parameters; see `BaseSFTMoEWrapper.lora_weights`.

    Parameters
    ----------
    sft : BaseSFTMoEWrapper
        Of mode ``sft``. Adapters that have no values yet get those of `init_lora_weights`.

    Returns
    -------
    dict of str to Parameter of float32 or bfloat16
        In the dtypes that the layer was given them in, float32 by default: ``gate_lora_a``, ``up_lora_a``
        [E, R, H], ``gate_lora_b``, ``up_lora_b`` [E, I, R], ``down_lora_a`` [E, R, I] and ``down_lora_b``
        [E, H, R]. No ``up`` when the activation is not gated; empty when `lora_rank` is 0.

    Examples
    --------
    >>> from ktmoe_np import KTMoEWrapper
    >>> sft = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2", mode="sft",
    ...                    method="AMXBF16_SFT", lora_rank=1)
    >>> lora_parameters(sft)["gate_lora_a"].shape
    torch.Size([2, 1, 4])
    """
    give = giver_of(torch.empty(0))
    return {name: torch.nn.Parameter(give(value.copy())) for name, value in sft.lora_weights.items()}


def _rows(
    config: MoEConfig, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, ids and weights as the operators take them: contiguous [T, ...], on one device."""
    hidden, slots = config.hidden_size, config.num_experts_per_tok
    given = {"hidden_states": hidden_states, "topk_ids": topk_ids, "topk_weights": topk_weights}
    for name, value in given.items():
        _check_tensor(name, value)
    lead = hidden_states.shape[:-1]
    _check("hidden_states", hidden_states, "bfloat16, float32 or float16", hidden_states.dtype in _HIDDEN)
    _check_shape("hidden_states", hidden_states, (*lead, hidden), f"[..., {hidden}]")
    is_integer = not (topk_ids.dtype.is_floating_point or topk_ids.dtype.is_complex)
    _check("topk_ids", topk_ids, "integers", is_integer and topk_ids.dtype is not torch.bool)
    _check("topk_weights", topk_weights, "floats", topk_weights.dtype.is_floating_point)
    for name, each in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        _check_shape(name, each, (*lead, slots), str([*lead, slots]))
        if each.device != hidden_states.device:
            raise TypeError(f"{name}: got a tensor on {each.device}, expected {hidden_states.device}")
    x = hidden_states.to(torch.bfloat16).reshape(-1, hidden).contiguous()
    ids = topk_ids.to(torch.int64).reshape(-1, slots).contiguous()
    if topk_ids.dtype is torch.uint64:  # what int64 has no number for became negative, and would be skipped
        ids = torch.where(ids < 0, config.num_experts, ids)
    return x, ids, topk_weights.to(torch.float32).reshape(-1, slots).contiguous()


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")


def _check(name: str, tensor: torch.Tensor, expected: str, is_fine: bool) -> None:
    if not is_fine:
        raise TypeError(f"{name}: got {tensor.dtype} {list(tensor.shape)}, expected {expected}")


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], expected: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {expected}")


def _adapter(name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An adapter as the operator takes it."""
    _check_tensor(name, tensor)
    if tensor.device != device:
        raise TypeError(f"{name}: got a tensor on {tensor.device}, expected {device}, as hidden_states")
    return (tensor if tensor.dtype in _ADAPTERS else tensor.float()).contiguous()
