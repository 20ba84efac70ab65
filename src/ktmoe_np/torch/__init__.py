"""Layers of experts in torch: under autograd, torch.compile, checkpointing, and in models of transformers.

`moe_sft` is an operator of torch with a derivative; `MoEExperts` is the module around it; `replace_experts`
puts such modules into a model of transformers. Tensors are on the CPU, where they are used in place, or on a
CUDA device, where passes go by the current stream in pinned memory.

Examples
--------
>>> import torch
>>> from ktmoe_np import KTMoEWrapper
>>> from ktmoe_np.models import EMBEDDED_MODEL
>>> sft = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, layer_idx=0, mode="sft", lora_rank=2)
>>> experts = MoEExperts(sft)
>>> optimizer = torch.optim.AdamW(experts.parameters(), lr=1e-2)
>>> x = torch.randn(2, 5, sft.config.hidden_size)
>>> weights, ids = torch.rand(2, 5, sft.config.num_experts).topk(sft.config.num_experts_per_tok)
>>> loss = experts(x, ids, weights).square().sum()
>>> loss.backward()
>>> optimizer.step()
"""

from .calls import lora_parameters, moe_forward, moe_sft
from .implementation import register_experts_implementation
from .modules import MoEExperts
from .replace import replace_experts

__all__ = [
    "MoEExperts",
    "lora_parameters",
    "moe_forward",
    "moe_sft",
    "register_experts_implementation",
    "replace_experts",
]
