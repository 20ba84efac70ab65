"""A layer as a torch module, under autograd."""
# needs: torch

# page
import torch

from ktmoe_np import KTMoEWrapper
from ktmoe_np.models import EMBEDDED_MODEL
from ktmoe_np.torch import MoEExperts

sft = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, layer_idx=0, mode="sft", lora_rank=4)
experts = MoEExperts(sft)  # a module; its parameters are the adapters
optimizer = torch.optim.AdamW(experts.parameters(), lr=1e-3)

x = torch.randn(2, 5, sft.config.hidden_size)
weights, ids = torch.rand(2, 5, sft.config.num_experts).topk(sft.config.num_experts_per_tok)
loss = experts(x, ids, weights).square().mean()
loss.backward()
optimizer.step()
# end
assert all(parameter.grad is not None for parameter in experts.parameters())
