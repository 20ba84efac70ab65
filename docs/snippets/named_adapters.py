"""Several adapters in one batch."""

# page
import ml_dtypes
import numpy as np

from ktmoe_np import KTMoEWrapper
from ktmoe_np.models import EMBEDDED_MODEL

moe = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, layer_idx=0)
E, P, H = moe.config.num_experts, moe.config.num_experts_per_tok, moe.config.hidden_size
rng = np.random.default_rng(0)
a = rng.standard_normal((E, 2, H)).astype(np.float32)
b = rng.standard_normal((E, moe.config.moe_intermediate_size, 2)).astype(np.float32)
french = moe.add_adapter("french", {"gate_lora_a": a, "gate_lora_b": b})  # or load_adapter(name, path)

x = rng.standard_normal((3, H)).astype(ml_dtypes.bfloat16)
ids = np.stack([rng.permutation(E)[:P] for _ in range(3)])
weights = np.full((3, P), 1 / P, np.float32)
y = moe.forward(x, ids, weights, adapters=np.array([french, -1, french]))  # -1: none
# end
assert (y[1] == moe.forward(x, ids, weights)[1]).all()
assert (y[0] != moe.forward(x, ids, weights)[0]).any()
