"""Experts on the CPU in a stream of torch on a GPU."""
# needs: torch

import torch

if not torch.cuda.is_available():
    raise SystemExit  # nothing to show here

# page
from ktmoe_np import KTMoEWrapper
from ktmoe_np.models import EMBEDDED_MODEL

moe = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, layer_idx=0)
E, P, H = moe.config.num_experts, moe.config.num_experts_per_tok, moe.config.hidden_size
stream = torch.cuda.current_stream()

x = torch.randn(4, H, device="cuda", dtype=torch.bfloat16)
weights, ids = torch.rand(4, E, device="cuda").topk(P)
moe.submit_forward(x, ids, weights, cuda_stream=stream)  # returns at once
shared = x @ x.T  # other work of the GPU
y = moe.sync_forward(cuda_stream=stream)  # only the stream waits
# end
assert y.device == x.device
