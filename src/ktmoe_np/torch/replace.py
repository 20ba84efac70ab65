"""Experts of a model of transformers, replaced by layers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal, Unpack, overload

from torch import nn

from ..arrays.types import PathLike
from ..experts import InferenceOverrides, KTMoEWrapper, Overrides, SFTOverrides
from ..inference.base import BaseMoEWrapper
from ..sft.base import BaseSFTMoEWrapper
from .implementation import register_experts_implementation
from .modules import MoEExperts, SeparateExperts

__all__ = ["replace_experts"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
#: The linear maps of an expert that is a module of its own, by family.
_LINEARS = ({"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"}, {"up_proj", "down_proj"})


@overload
def replace_experts(
    model: nn.Module,
    path: PathLike,
    *,
    method: str | None = None,
    mode: Literal["inference"] = "inference",
    **overrides: Unpack[InferenceOverrides],
) -> int: ...


@overload
def replace_experts(
    model: nn.Module,
    path: PathLike,
    *,
    method: str | None = None,
    mode: Literal["sft"],
    **overrides: Unpack[SFTOverrides],
) -> int: ...


def replace_experts(
    model: nn.Module,
    path: PathLike,
    *,
    method: str | None = None,
    mode: Literal["inference", "sft"] = "inference",
    **overrides: Unpack[Overrides],
) -> int:
    """Replace the routed experts of every layer of a model by those of a checkpoint.

    Routers, shared experts and all else stay the model's. The experts may be on the device ``meta``: they are
    not read. In mode ``sft`` the adapters become parameters of the model, ``...experts.lora.gate_lora_a`` and
    so on, which ``state_dict`` has in the place of the experts' weights; freeze the others if the adapters
    alone are to be trained.

    Parameters
    ----------
    model : nn.Module
        A model of transformers: with fused experts (transformers 5), called with hidden states, ids and
        weights, or with a list of experts that are modules of their own.
    path : str or path-like
        The checkpoint, as `KTMoEWrapper.from_pretrained` takes it: also a GGUF file, or a directory that
        ``ktmoe convert`` has written.
    method, mode, **overrides
        See `KTMoEWrapper.from_pretrained`.

    Returns
    -------
    int
        The number of layers whose experts were replaced.

    Raises
    ------
    ValueError
        A model without such experts, or a layer of another number of experts than the checkpoint's; all that
        `KTMoEWrapper.from_pretrained` raises.
    NotImplementedError
        Experts that are called in another way, such as Llama-4's.

    Notes
    -----
    When anything is raised, the model is as it was.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM
    >>> from ktmoe_np.models import EMBEDDED_MODEL
    >>> model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).requires_grad_(False)
    >>> n = replace_experts(model, EMBEDDED_MODEL, mode="sft", lora_rank=2)
    >>> trained = [name for name, p in model.named_parameters() if p.requires_grad]
    >>> n == model.config.num_hidden_layers, len(trained) == 6 * n
    (True, True)
    """
    with suppress(ImportError):  # of an older transformers, without the interface
        register_experts_implementation()
    found = list(_experts_of(model))
    if not found:
        raise ValueError(f"model: got {type(model).__name__} without routed experts, expected some")
    made: list[tuple[str, nn.Module]] = []
    for name, module in found:
        options: Any = overrides
        layer = KTMoEWrapper.from_pretrained(path, _layer_idx(name), method, mode=mode, **options)
        _check_fits(name, module, layer)
        experts = MoEExperts(layer).train(module.training)
        made.append((name, SeparateExperts(experts) if isinstance(module, nn.ModuleList) else experts))
    for name, new in made:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return len(made)


def _experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of routed experts, by name."""
    for name, module in model.named_modules():
        if _is_fused(module):
            _check_call(name, module)
            yield name, module
        elif _is_separate(name, module):
            yield name, module


def _is_fused(module: nn.Module) -> bool:
    """Whether the weights of all experts are parameters of the module."""
    own = dict(module.named_parameters(recurse=False))
    return all(name in own and own[name].ndim == 3 for name in ("down_proj",)) and any(
        name in own and own[name].ndim == 3 for name in ("gate_up_proj", "up_proj")
    )


def _is_separate(name: str, module: nn.Module) -> bool:
    """Whether the module is a list of experts."""
    if not isinstance(module, nn.ModuleList) or not name.endswith("experts") or not len(module):
        return False
    linears = {child for child, each in module[0].named_children() if isinstance(each, nn.Linear)}
    return linears in _LINEARS


def _check_call(name: str, module: nn.Module) -> None:
    """Raise NotImplementedError for experts that are called in another way than `MoEExperts`."""
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    if len(parameters) != 3 or getattr(module, "has_post_expert_norm", False):
        raise NotImplementedError(
            f"{name}: got {type(module).__name__}, called with {', '.join(parameters) or 'nothing'}, "
            "expected experts that take hidden states, ids and weights, without a norm behind them"
        )


def _layer_idx(name: str) -> int:
    found = _LAYER.search(f"{name}.")
    if found is None:
        raise ValueError(f"{name}: got experts outside of numbered layers, expected ...layers.N... before")
    return int(found.group(1))


def _check_fits(name: str, module: nn.Module, layer: BaseMoEWrapper | BaseSFTMoEWrapper) -> None:
    """Raise ValueError when the model has another number of experts than the checkpoint."""
    stacked = module if isinstance(module, nn.ModuleList) else module.get_parameter("down_proj")
    num_experts = len(stacked)
    if num_experts != layer.config.num_experts:
        raise ValueError(
            f"{name}: got {num_experts} experts, expected {layer.config.num_experts}, as at "
            f"{layer.weight_path}"
        )
