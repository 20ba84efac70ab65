"""Whole models against transformers: the embedded one token for token, and small ones of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmoe_np.models import EMBEDDED_MODEL, MoEDecoder, generate, load_tokenizer

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


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family(family: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():  # larger than at their beginning, so that all parts count
            weight.copy_(torch.randn_like(weight) * (0.5 if weight.ndim == 1 else weight.shape[-1] ** -0.5))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
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
