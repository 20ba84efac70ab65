"""Leave some experts of each token to the next layer."""

# page
import ml_dtypes
import numpy as np

from ktmoe_np import KTMoEWrapper
from ktmoe_np.models import EMBEDDED_MODEL

layers = [KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, i, max_deferred_experts_per_token=1) for i in range(2)]
E, P, H = (getattr(layers[0].config, n) for n in ("num_experts", "num_experts_per_tok", "hidden_size"))
x = np.ones((3, H), ml_dtypes.bfloat16)
ids = np.arange(3 * P).reshape(3, P) % E
weights = np.linspace(0.1, 0.3, P, dtype=np.float32) * np.ones((3, 1), np.float32)

for moe in layers:
    moe.submit_forward(x, ids, weights)  # the largest P - 1 first, the others afterwards
    # attention of this layer, on a GPU or here
    x = moe.sync_forward()  # with what the previous layer deferred
x = x + KTMoEWrapper.drain_deferred()  # what the last layer deferred
# end
assert x.shape == (3, H)
