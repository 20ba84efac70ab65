"""Leave the busiest experts to a GPU, here with NumPy arrays in its place."""

# page
import ml_dtypes
import numpy as np

from ktmoe_np import GPUExperts, KTMoEWrapper

E, P, H, I, T = 4, 2, 64, 32, 5
rng = np.random.default_rng(0)
gate, up, down = (
    (0.1 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)
    for shape in ((E, I, H), (E, I, H), (E, H, I))
)
mask = np.array([True, False, False, True])  # generate_gpu_experts_masks picks the busiest
moe = KTMoEWrapper(
    layer_idx=0,
    num_experts=E,
    num_experts_per_tok=P,
    hidden_size=H,
    moe_intermediate_size=I,
    gpu_experts_mask=mask,
)
moe.load_weights_from_tensors(gate, up, down)
gpu = GPUExperts(moe.config, mask, gate[mask], up[mask], down[mask])  # arrays of the device

x = rng.standard_normal((T, H)).astype(ml_dtypes.bfloat16)
ids, weights = rng.integers(0, E, (T, P)), rng.random((T, P), dtype=np.float32)
moe.submit_forward(x, ids, weights)  # on a GPU with cuda_stream=
partial = gpu.forward(x, ids, weights)  # meanwhile
y = gpu.add(moe.sync_forward(), partial)
# end
moe.set_gpu_experts_mask(None)
assert np.allclose(y.astype(float), moe.forward(x, ids, weights).astype(float), atol=0.02)
