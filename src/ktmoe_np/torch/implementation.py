"""The experts implementation "ktmoe" of transformers: the weights of a model's own modules."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import MoEConfig
from ..experts import KTMoEWrapper
from ..inference.base import BaseMoEWrapper
from ..io.layer_config import hf_layer_config
from ..sft.base import BaseSFTMoEWrapper
from .modules import MoEExperts

__all__ = ["layer_of_module", "register_experts_implementation"]

#: Where a module has its experts: in its own dict, so that they are no submodule of it.
_ATTRIBUTE = "_ktmoe_experts"


def register_experts_implementation() -> None:
    """Let models of transformers use ``set_experts_implementation("ktmoe")``.

    Importing `ktmoe_np.torch` does it when transformers is imported already, and `replace_experts` too. The
    experts then are those of the model's own weights, in bfloat16, which have no gradients: freeze them, or
    call the model within ``torch.no_grad()``. Weights in bfloat16 are used in place; others are converted
    once. `replace_experts` takes other encodings, and trains adapters.

    Raises
    ------
    ImportError
        There is no transformers, or one before 5, without an interface of experts.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("ktmoe", _experts_forward)


@dataclass(frozen=True, eq=False)
class _Made:
    """Experts, and the parameters of a module that they were made of; copies of the module have none yet."""

    experts: MoEExperts
    sources: tuple[nn.Parameter, ...]
    versions: tuple[int, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls with its module of experts."""
    made: _Made | None = self.__dict__.get(_ATTRIBUTE)
    if made is None or not (torch.compiler.is_compiling() or _is_of(made, self)):
        made = self.__dict__[_ATTRIBUTE] = _made_of(self)
    if torch.is_grad_enabled() and any(source.requires_grad for source in made.sources):
        raise RuntimeError(
            "experts: got weights that require grad, expected frozen ones with the implementation 'ktmoe', "
            "which has no gradients of them: experts.requires_grad_(False), or torch.no_grad()"
        )
    out: torch.Tensor = made.experts(hidden_states, top_k_index, top_k_weights)
    return out


def _sources(module: nn.Module) -> tuple[nn.Parameter, ...]:
    names = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
    found = tuple(getattr(module, name) for name in names if getattr(module, name, None) is not None)
    for source in found:
        if not isinstance(source, nn.Parameter):
            raise TypeError(
                f"experts: got weights of {type(source).__name__}, expected parameters, without adapters of "
                "PEFT: replace_experts trains adapters, and import_peft reads those of PEFT"
            )
    return found


def _is_of(made: _Made, module: nn.Module) -> bool:
    """Whether the parameters are those of the module, unchanged."""
    now = _sources(module)
    same = len(now) == len(made.sources) and all(a is b for a, b in zip(now, made.sources, strict=True))
    return same and tuple(source._version for source in now) == made.versions


def _made_of(module: nn.Module) -> _Made:
    sources = _sources(module)
    layer = layer_of_module(module, _layer_config(module), mode="sft", lora_rank=0)
    return _Made(MoEExperts(layer), sources, tuple(source._version for source in sources))


def _layer_config(module: nn.Module) -> MoEConfig:
    """The sizes and the activation of the layer that a module of experts is of."""
    config: Any = module.config
    return hf_layer_config(config.to_dict(), 0, f"config of {type(module).__name__}")


def layer_of_module(
    module: nn.Module, config: MoEConfig, *, mode: str = "inference", **options: Any
) -> BaseMoEWrapper | BaseSFTMoEWrapper:
    """A layer with the weights of a fused module of experts of transformers 5, in bfloat16.

    Raises
    ------
    NotImplementedError
        Experts with a norm behind them.
    ValueError
        Weights of other sizes than the config's.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise NotImplementedError(f"experts: got {type(module).__name__} with a norm behind, expected none")
    kind: Any = KTMoEWrapper
    layer: BaseMoEWrapper | BaseSFTMoEWrapper = kind(
        config.layer_idx,
        config.num_experts,
        config.num_experts_per_tok,
        config.hidden_size,
        config.moe_intermediate_size,
        method="BF16" if mode == "inference" else "BF16_SFT",
        mode=mode,
        activation=config.activation,
        **options,
    )
    gated = config.activation.gated
    first = _matrices(module, "gate_up_proj" if gated else "up_proj")
    down = _matrices(module, "down_proj")
    assert first is not None
    assert down is not None
    gate, up = _halves(module, first, config) if gated else (first, None)
    biases: dict[str, torch.Tensor | None] = {"down_bias": _bias(module, "down_proj")}
    first_bias = _bias(module, "gate_up_proj" if gated else "up_proj")
    if first_bias is not None:
        halves = _halves(module, first_bias, config) if gated else (first_bias, None)
        biases |= dict(zip(("gate_bias", "up_bias"), halves, strict=True))
    given: Any = {name: bias.contiguous() for name, bias in biases.items() if bias is not None}
    layer.load_weights_from_tensors(gate, up, down, **given)
    return layer


def _matrices(module: nn.Module, name: str) -> torch.Tensor:
    """Weights [E, N, K] in bfloat16; in the memory of the parameter if they are that there."""
    weights: torch.Tensor = getattr(module, name).detach().to("cpu", torch.bfloat16)
    return weights.transpose(1, 2).contiguous() if getattr(module, "is_transposed", False) else weights


def _bias(module: nn.Module, name: str) -> torch.Tensor | None:
    bias: torch.Tensor | None = getattr(module, f"{name}_bias", None)
    return None if bias is None else bias.detach().to("cpu", torch.float32)


def _halves(module: nn.Module, both: torch.Tensor, config: MoEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up of their rows one after the other, or in turns."""
    if getattr(module, "is_concatenated", True):
        inter = config.moe_intermediate_size
        return both[:, :inter], both[:, inter:]
    return both[:, 0::2], both[:, 1::2]


if "transformers" in sys.modules:
    with suppress(ImportError):
        register_experts_implementation()
