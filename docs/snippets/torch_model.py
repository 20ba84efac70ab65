"""Replace the experts of a transformers model, and train their adapters."""
# needs: torch transformers

import warnings

warnings.simplefilter("ignore")  # of transformers

# page
import torch
from transformers import AutoModelForCausalLM

from ktmoe_np.models import EMBEDDED_MODEL
from ktmoe_np.sft import export_peft
from ktmoe_np.torch import MoEExperts, replace_experts

model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).requires_grad_(False)
replace_experts(model, EMBEDDED_MODEL, mode="sft", lora_rank=4)  # adapters become parameters
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4)

ids = torch.tensor([list(b"And God said, Let there be light")])
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
export_peft("adapter", [m.update_layer() for m in model.modules() if isinstance(m, MoEExperts)])
# end
assert trained
