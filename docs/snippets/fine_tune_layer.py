"""Train the adapters of a layer: forward, backward, an optimizer in NumPy."""

# page
import ml_dtypes
import numpy as np

from ktmoe_np import KTMoEWrapper
from ktmoe_np.models import EMBEDDED_MODEL

sft = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, 0, mode="sft", lora_rank=4, lora_alpha=8.0)
sft.init_lora_weights()  # A uniform, B zero
E, P, H = sft.config.num_experts, sft.config.num_experts_per_tok, sft.config.hidden_size

rng = np.random.default_rng(0)
x = rng.standard_normal((16, H)).astype(ml_dtypes.bfloat16)
ids = np.stack([rng.permutation(E)[:P] for _ in range(16)])
weights = np.full((16, P), 1 / P, np.float32)
target = np.zeros((16, H), np.float32)

losses = []
for _ in range(5):
    y = sft.forward_sft(x, ids, weights)  # saved for the backward pass
    error = y.astype(np.float32) - target
    losses.append(float((error**2).mean()))
    gradients = sft.backward((2 * error / error.size).astype(ml_dtypes.bfloat16))
    # .grad_input bf16 [T, H], .grad_weights f32 [T, P], six matrices f32
    new = {
        name: matrix.astype(np.float32) - 10.0 * getattr(gradients, name)
        for name, matrix in sft.lora_weights.items()
    }
    sft.update_lora_weights(**new)  # copied
# end

assert losses[-1] < losses[0]

# save
sft.save_lora_weights("adapters.safetensors")

fresh = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, 0, mode="sft", lora_rank=4, lora_alpha=8.0)
fresh.load_lora_weights("adapters.safetensors")
# end save
assert (fresh.forward_sft(x, ids, weights) == sft.forward_sft(x, ids, weights)).all()
