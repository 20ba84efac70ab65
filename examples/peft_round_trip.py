"""Train adapters here, load them with PEFT, and read back what PEFT has saved.

    python examples/peft_round_trip.py [--folder DIR]

Prints how far the losses of both are apart, and that the adapters come back bit-identical.
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import AutoPeftModelForCausalLM

from ktmoe_np.models import EMBEDDED_MODEL, MoEDecoder, loss_and_gradients
from ktmoe_np.sft import export_peft, import_peft, peft_scale

TEXT = list(b"Alice was beginning to get very tired of sitting by her sister on the bank")


def train(model: MoEDecoder, steps: int) -> float:
    """Plain gradient descent on one text; the loss in bits per token."""
    for _ in range(steps):
        loss = loss_and_gradients(model, [TEXT])
        for layer, gradients in zip(model.trained_experts(), loss.layers, strict=True):
            new = {
                name: np.asarray(matrix, np.float32) - 2.0 * getattr(gradients, name)
                for name, matrix in layer.lora_weights.items()
            }
            layer.update_lora_weights(**new)
    return loss_and_gradients(model, [TEXT]).bits_per_token


def main() -> None:
    """Go there and back."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="by default a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())

    model = MoEDecoder.from_pretrained(mode="sft", lora_rank=4, lora_alpha=8.0)
    before = loss_and_gradients(model, [TEXT]).bits_per_token
    after = train(model, steps=5)
    print(f"trained: {before:.3f} to {after:.3f} bits per token")
    export_peft(folder / "ours", model.trained_experts(), base_model_name_or_path=str(EMBEDDED_MODEL))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = AutoPeftModelForCausalLM.from_pretrained(folder / "ours", dtype=torch.float32)
        tokens = torch.tensor([TEXT])
        with torch.no_grad():
            loss = peft_model(input_ids=tokens, labels=tokens).loss.item() / np.log(2)
        peft_model.save_pretrained(folder / "theirs")
    print(f"in PEFT, with weights in float32: {loss:.3f} bits per token, {abs(loss - after):.4f} apart")

    rank, alpha = peft_scale(folder / "theirs")
    fresh = MoEDecoder.from_pretrained(mode="sft", lora_rank=rank, lora_alpha=alpha)
    import_peft(folder / "theirs", fresh.trained_experts())
    equal = all(
        np.array_equal(np.asarray(matrix, np.float32), np.asarray(other.lora_weights[name], np.float32))
        for one, other in zip(model.trained_experts(), fresh.trained_experts(), strict=True)
        for name, matrix in one.lora_weights.items()
    )
    print(f"adapters that PEFT has saved: {'bit-identical' if equal else 'NOT the same'}")


if __name__ == "__main__":
    main()
