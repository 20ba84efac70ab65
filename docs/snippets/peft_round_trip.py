"""Write adapters in PEFT's format and read them again."""

# page
import numpy as np

from ktmoe_np import KTMoEWrapper
from ktmoe_np.models import EMBEDDED_MODEL
from ktmoe_np.sft import export_peft, import_peft, peft_scale

options = {"mode": "sft", "lora_rank": 4, "lora_alpha": 8.0}
trained = [KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, i, **options) for i in range(2)]
for layer in trained:
    layer.init_lora_weights()
    layer.update_lora_weights(down_lora_b=np.full_like(layer.lora_weights["down_lora_b"], 0.125))

export_peft("adapter", trained, base_model_name_or_path=EMBEDDED_MODEL)  # fused; or layout="per_expert"

rank, alpha = peft_scale("adapter")
fresh = [
    KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, i, mode="sft", lora_rank=rank, lora_alpha=alpha)
    for i in range(2)
]
import_peft("adapter", fresh)
# end

for one, other in zip(trained, fresh, strict=True):
    for name, matrix in one.lora_weights.items():
        assert (matrix == other.lora_weights[name]).all(), name
