"""Layers of experts as modules of torch."""

from __future__ import annotations

from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import nn

from ..inference.base import BaseMoEWrapper
from ..layers.base import MoELayer
from ..sft.base import BaseSFTMoEWrapper
from .calls import check_nothing_deferred, lora_parameters, moe_forward, moe_sft

__all__ = ["MoEExperts", "SeparateExperts"]

LayerT = TypeVar("LayerT", bound=MoELayer)


class _Shared(Generic[LayerT]):
    """A layer that copies of a module share: its weights are read, and its adapters are the modules'."""

    def __init__(self, layer: LayerT) -> None:
        self.layer = layer

    def __copy__(self) -> _Shared[LayerT]:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared[LayerT]:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"MoEExperts: got layer {self.layer.layer_idx} to be pickled, expected a state_dict: its weights "
            "stay in their checkpoint"
        )


class MoEExperts(nn.Module):
    """The experts of a layer as a module, in the place of those of a model of transformers.

    Parameters
    ----------
    layer : BaseMoEWrapper or BaseSFTMoEWrapper
        Loaded. One for training has its adapters as parameters of the module (`lora`), which are what
        `state_dict` has; the base weights stay in the layer, and copies of the module share them.

    Attributes
    ----------
    lora : nn.ParameterDict
        The adapters by name, see `lora_parameters`; empty in mode ``inference``.

    Raises
    ------
    TypeError
        Not a layer.
    ValueError
        A layer with dropout, or one that defers experts.

    Examples
    --------
    >>> import ml_dtypes, numpy as np, torch
    >>> from ktmoe_np import KTMoEWrapper
    >>> sft = KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                    moe_intermediate_size=2, activation="relu2", mode="sft",
    ...                    method="AMXBF16_SFT", lora_rank=1)
    >>> gate, down = np.ones((2, 2, 4), ml_dtypes.bfloat16), np.ones((2, 4, 2), ml_dtypes.bfloat16)
    >>> sft.load_weights_from_tensors(gate, None, down)
    >>> experts = MoEExperts(sft)
    >>> sorted(name for name, _ in experts.named_parameters())
    ['lora.down_lora_a', 'lora.down_lora_b', 'lora.gate_lora_a', 'lora.gate_lora_b']
    >>> experts(torch.ones(1, 4), torch.tensor([[1]]), torch.ones(1, 1)).tolist()
    [[32.0, 32.0, 32.0, 32.0]]
    """

    def __init__(self, layer: BaseMoEWrapper | BaseSFTMoEWrapper) -> None:
        super().__init__()
        if not isinstance(layer, (BaseMoEWrapper, BaseSFTMoEWrapper)):
            raise TypeError(f"layer: got {type(layer).__name__}, expected one that KTMoEWrapper makes")
        self._shared: _Shared[BaseMoEWrapper | BaseSFTMoEWrapper] = _Shared(layer)
        self.num_experts = layer.config.num_experts
        self.is_trained = isinstance(layer, BaseSFTMoEWrapper)
        self.lora = nn.ParameterDict()
        if isinstance(layer, BaseSFTMoEWrapper):
            if layer.options.lora_dropout:
                raise ValueError(f"layer: got lora_dropout {layer.options.lora_dropout}, expected 0")
            self.lora.update(lora_parameters(layer))
        else:
            check_nothing_deferred(layer)

    @property
    def layer(self) -> BaseMoEWrapper | BaseSFTMoEWrapper:
        """The layer, which copies of the module share."""
        return self._shared.layer

    def update_layer(self) -> BaseSFTMoEWrapper:
        """Give the layer the adapters of the module, for what writes those of layers.

        Returns
        -------
        BaseSFTMoEWrapper
            The layer, for `ktmoe_np.sft.export_peft` or `BaseSFTMoEWrapper.save_lora_weights`.

        Raises
        ------
        TypeError
            A layer for inference.

        Examples
        --------
        Write the adapters of a model in the PEFT format::

            layers = [m.update_layer() for m in model.modules() if isinstance(m, MoEExperts)]
            export_peft("adapter", layers)
        """
        layer = self._shared.layer
        if not isinstance(layer, BaseSFTMoEWrapper):
            raise TypeError(f"layer: got {type(layer).__name__}, expected one of mode 'sft'")
        wide = {
            name: p.detach().cpu() if p.dtype in (torch.float32, torch.bfloat16) else p.detach().cpu().float()
            for name, p in self.lora.items()
        }
        if wide:
            layer.update_lora_weights(**wide)
        return layer

    def extra_repr(self) -> str:
        """The layer, in one line."""
        return repr(self.layer).strip("<>")

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum of the experts of each token, in the dtype of the hidden states.

        Parameters
        ----------
        hidden_states : tensor of floats [..., H]
            Rounded to bfloat16.
        top_k_index : tensor of integers [..., P]
            Negative ids and those of E and above, which transformers has for experts elsewhere, are skipped.
        top_k_weights : tensor of floats [..., P]

        Returns
        -------
        tensor [..., H]
            On the device of the hidden states.
        """
        is_wide = hidden_states.dtype is torch.float64
        x = hidden_states.float() if is_wide else hidden_states
        ids = top_k_index.to(torch.int64)  # other dtypes may have no -1
        ids = torch.where(ids < self.num_experts, ids, -1)
        layer = self._shared.layer
        if isinstance(layer, BaseSFTMoEWrapper):
            out = moe_sft(layer, dict(self.lora.items()), x, ids, top_k_weights)
        else:
            out = moe_forward(layer, x, ids, top_k_weights)
        return out.to(hidden_states.dtype)


class SeparateExperts(nn.Module):
    """The experts of a layer one by one, in the place of a list of modules: ``experts[e](rows)``.

    For blocks that pick the rows of each expert and weigh its output themselves. An expert is computed for
    its rows alone; `MoEExperts` computes all of them in one call.

    Parameters
    ----------
    experts : MoEExperts
    """

    def __init__(self, experts: MoEExperts) -> None:
        super().__init__()
        self.experts = experts

    def __len__(self) -> int:
        return self.experts.num_experts

    def __getitem__(self, expert: int) -> _OneExpert:
        number = int(expert)
        if not -len(self) <= number < len(self):
            raise IndexError(f"experts: got {number}, expected one of {len(self)}")
        return _OneExpert(self.experts, number % len(self))


class _OneExpert:
    """An expert as a block calls it."""

    def __init__(self, experts: MoEExperts, number: int) -> None:
        self._experts, self._number = experts, number

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        routes = (*rows.shape[:-1], self._experts.layer.config.num_experts_per_tok)
        ids = torch.full(routes, -1, device=rows.device)
        ids[..., 0] = self._number
        out: torch.Tensor = self._experts(rows, ids, torch.ones(routes, device=rows.device))
        return out
