"""Count and time the passes of a layer, and write a timeline."""

# page
import ml_dtypes
import numpy as np

import ktmoe_np
from ktmoe_np.models import EMBEDDED_MODEL

moe = ktmoe_np.KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, layer_idx=0)
E, P, H = moe.config.num_experts, moe.config.num_experts_per_tok, moe.config.hidden_size
x = np.ones((8, H), ml_dtypes.bfloat16)
ids = np.arange(8 * P).reshape(8, P) % E
weights = np.full((8, P), 1 / P, np.float32)

moe.collect_stats()
with ktmoe_np.trace("trace.json"):  # open it in Perfetto
    moe.forward(x, ids, weights)
stats = moe.stats()

used = stats.expert_tokens  # how often each expert was routed to [E]
rate = stats.weight_bytes / stats.seconds  # bytes of weights per second
phases = stats.phase_seconds  # route, gate_up, down, combine
# end
assert used.sum() == 8 * P
assert {"route", "gate_up", "down", "combine"} <= set(phases)
assert rate > 0

# masks
masks = ktmoe_np.generate_gpu_experts_masks([used], num_gpu_experts=2)  # bool [layers, E]
# end masks
assert masks.sum() == 2
