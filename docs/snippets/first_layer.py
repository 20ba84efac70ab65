"""Run the experts of one layer of the packaged model, and compare them with the reference."""

# page
import ml_dtypes
import numpy as np

from ktmoe_np import KTMoEWrapper
from ktmoe_np.models import EMBEDDED_MODEL  # or the path of your checkpoint

moe = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, layer_idx=0)  # mapped, not read
E, P, H = moe.config.num_experts, moe.config.num_experts_per_tok, moe.config.hidden_size

rng = np.random.default_rng(0)
x = rng.standard_normal((4, H)).astype(ml_dtypes.bfloat16)  # hidden states [T, H]
ids = np.stack([rng.permutation(E)[:P] for _ in range(4)])  # experts of each token [T, P]
weights = np.full((4, P), 1 / P, np.float32)  # routing weights [T, P]

y = moe.forward(x, ids, weights)  # bfloat16 [T, H]
# end

assert y.shape == (4, H)
assert y.dtype == ml_dtypes.bfloat16

# submit
moe.submit_forward(x, ids, weights)  # starts the pass
shared = x + x  # other work, while the experts are computed
same = moe.sync_forward()  # waits for the result
# end submit
assert (same == y).all()

# alone
alone = moe.forward(x[:1], ids[:1], weights[:1])
assert (alone[0] == y[0]).all()  # the bits of a token do not depend on its batch
# end alone
