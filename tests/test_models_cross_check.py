"""Whole models against transformers: the embedded one token for token, and small ones of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmoe_np.models import EMBEDDED_MODEL, MoEDecoder, generate, load_tokenizer, loss_and_gradients

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

#: model_type -> the rest of its configuration.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 32, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "sliding_window": None},
    "olmoe": {"num_experts": 8, "norm_topk_prob": False, "clip_qkv": 0.5},
}

PROMPTS = ("And God said, Let there be light: and there was", "The LORD is my shepherd", "of man's first")


def theirs(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_embedded_model_says_the_same(prompt: str) -> None:
    model, tokenizer = theirs(EMBEDDED_MODEL), transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == load_tokenizer(EMBEDDED_MODEL).encode(prompt)
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=128, do_sample=False)[0, ids.shape[1] :].tolist()
    assert list(generate(MoEDecoder.from_pretrained(), ids[0].tolist(), 128)) == expected
    assert tokenizer.decode(expected) == load_tokenizer(EMBEDDED_MODEL).decode(expected)


def random_model(family: str, path: Path) -> None:
    """Write a small model of a family, its numbers larger than at first, so that all parts count."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.5 if weight.ndim == 1 else weight.shape[-1] ** -0.5))
    model.to(torch.bfloat16).save_pretrained(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family(family: str, tmp_path: Path) -> None:
    random_model(family, tmp_path)
    tokens = np.random.default_rng(5).integers(0, COMMON["vocab_size"], 24)
    with torch.no_grad():
        expected = theirs(tmp_path)(torch.tensor(tokens[None])).logits[0].numpy()

    ours = MoEDecoder.from_pretrained(tmp_path)
    cache = ours.new_cache()
    parts = [ours.forward([part], [cache])[0] for part in (tokens[:17], tokens[17:])]
    errors = np.linalg.norm(np.concatenate(parts) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    # What goes into the experts, and what lies within, is rounded to bfloat16; and a token whose experts are
    # nearly tied may go to others.
    assert np.sort(errors)[-3] < 0.003


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family(family: str, tmp_path: Path) -> None:
    random_model(family, tmp_path)
    rank, alpha = 4, 8.0
    ours = MoEDecoder.from_pretrained(tmp_path, mode="sft", lora_rank=rank, lora_alpha=alpha)
    rng = np.random.default_rng(6)
    tokens = rng.integers(0, COMMON["vocab_size"], 24)
    adapters = []
    for experts in ours.trained_experts():
        shapes = {name: x.shape for name, x in experts.lora_weights.items()}
        drawn = {n: rng.normal(0, 0.4 * s[-1] ** -0.5, s).astype(np.float32) for n, s in shapes.items()}
        drawn = {n: np.array(torch.tensor(x).bfloat16().float()) for n, x in drawn.items()}
        experts.init_lora_weights(**drawn)
        adapters.append(drawn)

    model = theirs(tmp_path)
    parts = [adapted_experts(layer, adapters[i], alpha / rank) for i, layer in enumerate(model.model.layers)]
    logits = model(torch.tensor(tokens[None, :-1])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]))
    expected.backward()

    loss = loss_and_gradients(ours, [tokens])
    assert loss.bits_per_token * np.log(2) == pytest.approx(expected.item(), rel=2e-3)
    for gradients, leaves in zip(loss.layers, parts, strict=True):
        for name, matrix in gradients.matrices.items():
            true = leaves[name].grad.numpy()
            assert np.linalg.norm(matrix - true) < 0.03 * np.linalg.norm(true), name


def adapted_experts(layer: Any, adapters: dict[str, Any], scale: float) -> dict[str, Any]:
    """Give a layer's experts adapters, whose tensors are returned, as sums in its weights."""
    experts = layer.mlp.experts
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in adapters.items()}
    deltas = {
        name: scale * leaves[f"{name}_lora_b"] @ leaves[f"{name}_lora_a"] for name in ("gate", "up", "down")
    }
    gate_up = experts.gate_up_proj.detach() + torch.cat((deltas["gate"], deltas["up"]), 1)
    down = experts.down_proj.detach() + deltas["down"]
    del experts.gate_up_proj, experts.down_proj  # were leaves; these are not
    experts.gate_up_proj, experts.down_proj = gate_up, down
    return leaves
