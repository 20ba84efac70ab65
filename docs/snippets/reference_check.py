"""Compare a layer with the reference, within the bound that the reference computes."""

# page
import ml_dtypes
import numpy as np

from ktmoe_np import KTMoEWrapper, MoEConfig
from ktmoe_np.reference import assert_within, error_bound, moe_forward

E, P, H, I, T = 4, 2, 64, 32, 5
rng = np.random.default_rng(0)


def draw(*shape):
    """Gaussian numbers in bfloat16."""
    return (0.1 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)


gate, up, down = draw(E, I, H), draw(E, I, H), draw(E, H, I)
x, ids = draw(T, H), rng.integers(0, E, (T, P))
weights = rng.random((T, P), dtype=np.float32)

moe = KTMoEWrapper(layer_idx=0, num_experts=E, num_experts_per_tok=P, hidden_size=H, moe_intermediate_size=I)
moe.load_weights_from_tensors(gate, up, down)  # used in place, not copied

got = moe.forward(x, ids, weights)
want = moe_forward(x, ids, weights, gate, up, down)
bound = error_bound(x, ids, weights, gate, up, down)
assert_within(got, want, bound)
# end

assert MoEConfig(E, P, H, I) is not None
