"""Write a small GGUF file, and run its experts in place."""
# needs: gguf

import gguf
import numpy as np

E, P, H, I = 4, 2, 64, 32
rng = np.random.default_rng(0)
writer = gguf.GGUFWriter("model.gguf", "qwen3moe")
writer.add_block_count(1)
writer.add_embedding_length(H)
writer.add_expert_count(E)
writer.add_expert_used_count(P)
writer.add_expert_feed_forward_length(I)
for name, shape in (("gate", (E, I, H)), ("up", (E, I, H)), ("down", (E, H, I))):
    kind = gguf.GGMLQuantizationType.Q8_0
    numbers = rng.standard_normal(shape).astype(np.float32)
    writer.add_tensor(f"blk.0.ffn_{name}_exps.weight", gguf.quants.quantize(numbers, kind), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

# page
import ml_dtypes

from ktmoe_np import KTMoEWrapper

moe = KTMoEWrapper.from_pretrained("model.gguf", layer_idx=0)  # mapped; method LLAMAFILE

x = np.ones((3, moe.config.hidden_size), ml_dtypes.bfloat16)
ids = np.array([[0, 1], [2, 3], [1, 0]])
weights = np.full((3, 2), 0.5, np.float32)
y = moe.forward(x, ids, weights)  # activations in bf16
y8 = moe.forward(x, ids, weights, activation_dtype="int8")  # as llama.cpp computes
# end
assert y.shape == y8.shape == (3, H)
assert moe.method == "LLAMAFILE"
