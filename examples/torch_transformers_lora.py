"""Fine-tune the experts of a model of transformers: the model is torch's, its experts run here.

    python examples/torch_transformers_lora.py [CHECKPOINT] [--steps 10] [--out adapter]

The adapters are written in PEFT's format, so PEFT loads them into the same model without this library.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM

from ktmoe_np.models import EMBEDDED_MODEL, EMBEDDED_TEXT, load_tokenizer
from ktmoe_np.sft import export_peft
from ktmoe_np.torch import MoEExperts, replace_experts


def main() -> None:
    """Train the adapters on a text and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=str(EMBEDDED_MODEL))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--window", type=int, default=128, help="tokens of a text")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", default="adapter")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    model.requires_grad_(False)
    num_layers = replace_experts(model, arguments.checkpoint, mode="sft", lora_rank=8, lora_alpha=16.0)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"{num_layers} layers, {sum(p.numel() for p in adapters):,} parameters of adapters")

    text = load_tokenizer(arguments.checkpoint).encode(EMBEDDED_TEXT.read_text()[:100_000])
    optimizer = torch.optim.AdamW(adapters, lr=arguments.rate)
    size = 4 * arguments.window
    for i in range(arguments.steps):
        tokens = torch.tensor(text[i * size : (i + 1) * size]).reshape(4, arguments.window)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {i + 1:3d}: {loss.item():.4f} nats per token")

    layers = [module.update_layer() for module in model.modules() if isinstance(module, MoEExperts)]
    export_peft(arguments.out, layers, base_model_name_or_path=arguments.checkpoint)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
