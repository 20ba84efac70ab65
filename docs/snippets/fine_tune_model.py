"""Training steps of a whole decoder."""

# page
import numpy as np

from ktmoe_np.models import MoEDecoder, loss_and_gradients

model = MoEDecoder.from_pretrained(mode="sft", lora_rank=4)  # the packaged model; adapters are initialized
windows = [list(b"And God saw the light, that it was good"), list(b"And the evening and the morning")]

losses = []
for _ in range(3):
    loss = loss_and_gradients(model, windows)
    losses.append(loss.bits_per_token)
    for layer, gradients in zip(model.trained_experts(), loss.layers, strict=True):
        layer.update_lora_weights(
            **{
                name: matrix.astype(np.float32) - 0.5 * getattr(gradients, name)
                for name, matrix in layer.lora_weights.items()
            }
        )
# end
assert losses[-1] < losses[0]
