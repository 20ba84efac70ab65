"""Adapters in replaced experts train as those of PEFT do, in float32, with the same parameters and routing.

PEFT has one A for gate and up: ours are both set to it, and the gradients of the two add up to PEFT's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from torch_models import (  # noqa: E402
    FAMILIES,
    VOCAB,
    E,
    I,
    TorchExperts,
    blocks_of,
    replayed_routing,
    saved_model,
    tiny_model,
)

from ktmoe_np.torch import replace_experts  # noqa: E402

pytestmark = [
    pytest.mark.crosscheck,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

RANK, ALPHA, STEPS = 3, 6.0, 3
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def of_peft(parameters: dict[str, Any], layer: int, family: str) -> dict[str, Any]:
    """PEFT's matrices of a layer under our names; also gradients, which have the same layout.

    Rows of gate and up are those of the model's weights: one after the other, in gpt-oss in turns.
    """
    where = f"base_model.model.model.layers.{layer}.mlp.experts"

    def matrices(wrapped: str) -> tuple[Any, Any]:
        a = parameters[f"{where}{wrapped}.lora_A.default.weight"]
        b = parameters[f"{where}{wrapped}.lora_B.default.weight"]
        return a.reshape(E, RANK, -1), b.reshape(-1, RANK, E).permute(2, 0, 1)

    (a, b), (down_a, down_b) = matrices(".base_layer"), matrices("")
    gate_b, up_b = (b[:, 0::2], b[:, 1::2]) if family == "gpt_oss" else (b[:, :I], b[:, I:])
    both = {"gate_lora_a": a, "up_lora_a": a, "gate_lora_b": gate_b, "up_lora_b": up_b}
    return {**both, "down_lora_a": down_a, "down_lora_b": down_b}


def wrapped_by_peft(family: str) -> Any:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=TARGETS, init_lora_weights=False
    )
    model = peft.get_peft_model(tiny_model(family), config)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if "lora" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def loss_of(model: Any, tokens: Any) -> Any:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def gradients_of(model: Any) -> list[dict[str, Any]]:
    """The gradients of the adapters by layer, of A of gate and up together."""
    found = []
    for block in blocks_of(model):
        grads = {name: p.grad.clone() for name, p in block.experts.lora.items()}
        grads["gate_lora_a"] += grads.pop("up_lora_a")
        found.append(grads)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_step_by_step(family: str, tmp_path: Path) -> None:
    path, theirs = saved_model(family, tmp_path), wrapped_by_peft(family)
    ours, peer = tiny_model(family), tiny_model(family)
    originals = [block.experts for block in blocks_of(peer)]
    replace_experts(ours, path, mode="sft", lora_rank=RANK, lora_alpha=ALPHA)
    for block, mine, original in zip(blocks_of(peer), blocks_of(ours), originals, strict=True):
        block.experts = TorchExperts(original, mine.experts.lora, ALPHA / RANK, torch.bfloat16)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for step in range(STEPS):
        tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(step))
        routing: list[Any] = []
        optimizer.zero_grad()
        with replayed_routing(routing, record=True):
            loss_of(theirs, tokens).backward()
        for model in (ours, peer):
            model.zero_grad()
            with torch.no_grad():
                for layer, block in enumerate(blocks_of(model)):
                    for name, matrix in of_peft(trained, layer, family).items():
                        block.experts.lora[name].copy_(matrix)
            with replayed_routing(routing, record=False):
                loss_of(model, tokens).backward()
        wanted = [
            of_peft({name: p.grad for name, p in trained.items()}, layer, family)
            for layer in range(len(originals))
        ]
        for name in ("gate_lora_a", "gate_lora_b", "up_lora_b", "down_lora_a", "down_lora_b"):
            error, bound = (
                sum(
                    (found[name] - right[name]).square().sum()
                    for found, right in zip(gradients_of(model), wanted, strict=True)
                ).sqrt()
                for model in (ours, peer)
            )
            assert error <= 2 * bound, f"step {step}: {name}: {error:.3g}, of the peer {bound:.3g}"
        optimizer.step()
