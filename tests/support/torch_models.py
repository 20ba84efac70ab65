"""Small models of transformers, and their experts in torch alone, in any dtype: the truth, and a peer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

__all__ = ["FAMILIES", "TorchExperts", "blocks_of", "replayed_routing", "saved_model", "tiny_model"]

E, P, H, I, LAYERS, VOCAB = 6, 2, 64, 48, 2, 96  # noqa: E741

_COMMON = {
    "hidden_size": H,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "num_experts_per_tok": P,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}

#: Family -> its config in transformers, and the sizes under its names.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": E, "moe_intermediate_size": I, "intermediate_size": 80, "norm_topk_prob": True},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": E, "intermediate_size": I}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": E, "intermediate_size": I, "sliding_window": 8}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": E,
            "moe_intermediate_size": I,
            "intermediate_size": 80,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
        },
    ),
}


def tiny_model(family: str, seed: int = 0) -> Any:
    """A model with random weights, float32 with numbers that bfloat16 has."""
    import transformers

    name, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**{**_COMMON, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            parameter.copy_(parameter.bfloat16())
    return model


def saved_model(family: str, directory: Path) -> Path:
    """The checkpoint that transformers writes of the model, in bfloat16."""
    path = directory / family
    tiny_model(family).bfloat16().save_pretrained(path)
    return path


def blocks_of(model: Any) -> list[Any]:
    """The blocks whose child `experts` are the routed experts, by layer."""
    return [layer.mlp for layer in model.model.layers]


class TorchExperts(nn.Module):
    """The experts of a block with adapters, written out in torch: in a dtype, or in that of their inputs.

    Parameters
    ----------
    experts : nn.Module
        Fused experts of transformers 5, before they were replaced.
    lora : mapping of str to tensor
        The adapters, under the names of `BaseSFTMoEWrapper.lora_weights`.
    scale : float
        lora_alpha / R.
    dtype : torch.dtype
        What is computed in, and rounded to after each operation.
    """

    def __init__(self, experts: nn.Module, lora: Any, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        bias = getattr(experts, "gate_up_proj_bias", None)
        if getattr(experts, "is_transposed", False):
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        concatenated = getattr(experts, "is_concatenated", True)
        halves = (slice(0, I), slice(I, None)) if concatenated else (slice(0, None, 2), slice(1, None, 2))
        self.weights = {
            "gate": (gate_up[:, halves[0]], None if bias is None else bias.detach()[:, halves[0]]),
            "up": (gate_up[:, halves[1]], None if bias is None else bias.detach()[:, halves[1]]),
            "down": (down, None if bias is None else experts.down_proj_bias.detach()),
        }
        self.lora = nn.ParameterDict({name: nn.Parameter(p.detach().clone()) for name, p in lora.items()})
        self.scale, self.dtype, self.is_gpt_oss = scale, dtype, bias is not None

    def _product(self, x: Any, name: str, e: int) -> Any:
        weights, bias = self.weights[name]
        a, b = (self.lora[f"{name}_lora_{m}"][e].bfloat16().to(self.dtype) for m in "ab")
        y = x @ weights[e].to(self.dtype).T + self.scale * ((x @ a.T) @ b.T)
        return y if bias is None else y + bias[e].to(self.dtype)

    def forward(self, hidden_states: Any, ids: Any, weights: Any) -> Any:
        """The sum of the experts of each token."""
        x = hidden_states.to(self.dtype)
        out = torch.zeros_like(x)
        for e in range(E):
            tokens, slots = torch.where(ids == e)
            gate, up = (self._product(x[tokens], name, e) for name in ("gate", "up"))
            if self.is_gpt_oss:
                gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
                h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            else:
                h = nn.functional.silu(gate) * up
            y = self._product(h, "down", e) * weights[tokens, slots, None].to(self.dtype)
            out = out.index_add(0, tokens, y)
        return out.to(hidden_states.dtype)


@contextmanager
def replayed_routing(recorded: list[Any], record: bool) -> Iterator[None]:
    """Let `torch.topk` pick what it picked before, in order; or record what it picks."""
    plain, calls = torch.topk, iter(list(recorded))

    def topk(values: Any, *arguments: Any, **options: Any) -> Any:
        if record:
            found = plain(values, *arguments, **options)
            recorded.append(found.indices)
            return found
        indices = next(calls)
        return torch.return_types.topk((values.gather(-1, indices), indices))

    with mock.patch.object(torch, "topk", topk):
        yield
