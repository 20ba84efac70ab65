"""Generate text with attention on a GPU and experts on the CPU.

    python examples/gpu_hybrid_decoder.py [CHECKPOINT] [--tokens 64] [--device cuda]

The model of transformers is moved to the GPU without its experts, which stay mapped in the host's memory.
A call of a layer copies the rows of its tokens to the host and back in the current stream, and only the
stream waits.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from ktmoe_np.models import EMBEDDED_MODEL, load_tokenizer
from ktmoe_np.torch import replace_experts


def load_without_experts(path: str, device: str) -> torch.nn.Module:
    """A model whose dense tensors are on the device and whose experts torch has never read."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    replace_experts(model, path)
    dense = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt", device=device) as tensors:
            dense |= {name: tensors.get_tensor(name) for name in tensors.keys() if ".experts." not in name}  # noqa: SIM118
    model.load_state_dict(dense, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"{path}: got no tensors for {missing[:3]}, expected all but the experts")
    return model.to(device).eval()


def main() -> None:
    """Continue a text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=str(EMBEDDED_MODEL))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", default="And God said, Let there be light")
    parser.add_argument("--device", default="cuda", help="cpu runs everything there, to compare")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no GPU here; --device cpu runs the same program without one")

    tokenizer = load_tokenizer(arguments.checkpoint)
    model = load_without_experts(arguments.checkpoint, arguments.device)
    prompt = torch.tensor([tokenizer.encode(arguments.prompt)], device=arguments.device)
    begin = time.perf_counter()
    with torch.no_grad():
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=arguments.tokens,
            do_sample=False,
            pad_token_id=0,
        )
    seconds = time.perf_counter() - begin
    print(tokenizer.decode(tokens[0].tolist()))
    rate = (tokens.shape[1] - prompt.shape[1]) / seconds
    print(f"{rate:.1f} tokens per second, attention on {arguments.device}")


if __name__ == "__main__":
    main()
