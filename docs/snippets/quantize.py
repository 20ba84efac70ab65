"""Quantize a layer at load, save it, and map the file."""

# page
import ml_dtypes
import numpy as np

from ktmoe_np import KTMoEWrapper
from ktmoe_np.models import EMBEDDED_MODEL

moe = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, 0, method="AMXINT4")  # quantized at load
file = moe.save_weights("experts-int4")  # experts-int4/layer-00000.safetensors

c = moe.config
mapped = KTMoEWrapper(
    layer_idx=0,
    num_experts=c.num_experts,
    num_experts_per_tok=c.num_experts_per_tok,
    hidden_size=c.hidden_size,
    moe_intermediate_size=c.moe_intermediate_size,
    method="AMXINT4",
    weight_path="experts-int4",
)
mapped.load_weights()  # maps the file
# end

rng = np.random.default_rng(0)
x = rng.standard_normal((4, c.hidden_size)).astype(ml_dtypes.bfloat16)
ids = np.stack([rng.permutation(c.num_experts)[: c.num_experts_per_tok] for _ in range(4)])
weights = np.full(ids.shape, 0.5, np.float32)
assert (mapped.forward(x, ids, weights) == moe.forward(x, ids, weights)).all()
assert file.exists()

# methods
for method in ("MOE_INT4", "AMXINT4"):  # the same bytes, with bf16 and with int8 activations
    layer = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, 0, method=method)
    y = layer.forward(x, ids, weights)
# end methods
