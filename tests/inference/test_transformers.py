"""The reference, the configuration and the loader against the model code of transformers.

Each model is built tiny with random weights and saved as transformers saves it; one layer's experts are then
run by transformers in float32 and by the reference. The one difference is the rounding of the intermediate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ktmoe_np.config import MoEConfig
from ktmoe_np.io import load_experts, load_hf_config
from ktmoe_np.reference import moe_forward

pytestmark = pytest.mark.filterwarnings("ignore")

T, E, P, H, I = 9, 4, 2, 32, 48  # noqa: E741

COMMON = {
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
LOCAL = {"num_local_experts": E, "num_experts_per_tok": P, "intermediate_size": I}
NUMBERED = {"num_experts": E, "num_experts_per_tok": P, "moe_intermediate_size": I}
ROUTED = {"n_routed_experts": E, "num_experts_per_tok": P, "moe_intermediate_size": I}
HEAD = {"head_dim": 8}

#: model_type -> its configuration, and the activation that it must be read as.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": (LOCAL, "silu"),
    "phimoe": (LOCAL, "silu"),
    "granitemoe": (LOCAL, "silu"),
    "minimax_m2": ({**LOCAL, **HEAD, "rotary_dim": 8}, "silu"),
    "gpt_oss": ({**LOCAL, **HEAD}, "swigluoai"),
    "minimax_m3_vl_text": ({**LOCAL, **HEAD}, "swigluoai"),
    "llama4_text": ({**LOCAL, **HEAD, "intermediate_size_mlp": I}, "silu"),
    "qwen3_moe": ({**NUMBERED, **HEAD}, "silu"),
    "qwen3_next": ({**NUMBERED, **HEAD}, "silu"),
    "lfm2_moe": (
        {**NUMBERED, "intermediate_size": I, "num_dense_layers": 0, "layer_types": ["full_attention"] * 2},
        "silu",
    ),
    "olmoe": ({**NUMBERED, "intermediate_size": I}, "silu"),
    "jamba": ({**NUMBERED, "intermediate_size": I, "mamba_d_state": 4}, "silu"),
    "deepseek_v3": (
        {**ROUTED, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
        "silu",
    ),
    "deepseek_v4": (ROUTED, "silu"),
    "glm4_moe": ({**ROUTED, **HEAD, "first_k_dense_replace": 0}, "silu"),
    "nemotron_h": (
        {
            **ROUTED,
            **HEAD,
            "layers_block_type": ["mamba", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "ssm_state_size": 8,
            "intermediate_size": I,
            "moe_shared_expert_intermediate_size": I,
            "moe_latent_size": 16,
        },
        "relu2",
    ),
    "gemma4_text": (
        {
            "num_experts": E,
            "top_k_experts": P,
            "moe_intermediate_size": I,
            "enable_moe_block": True,
            "intermediate_size": I,
            "hidden_size_per_layer_input": 0,
            **HEAD,
        },
        "gelu_tanh",
    ),
    "ernie4_5_moe": ({"moe_num_experts": E, "moe_k": P, "moe_intermediate_size": I}, "silu"),
    "hunyuan_v1_moe": ({"num_experts": E, "moe_topk": P, "intermediate_size": I, **HEAD}, "silu"),
    "aria_text": ({"moe_num_experts": E, "moe_topk": P, "intermediate_size": I}, "silu"),
}


def run_experts(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
    """Run a model's module of experts in float32."""
    import torch

    experts = experts.float()
    if type(experts).__name__ != "Llama4TextExperts":
        return experts(x, ids, weights)
    # Llama-4's takes the rows of every expert in turn, which its caller has scaled by the weights.
    total = torch.zeros(T, H)
    for p in range(P):
        scaled = (weights[:, p, None] * x).bfloat16().float()
        total += experts(scaled.repeat(E, 1)).view(E, T, H)[ids[:, p], torch.arange(T)]
    return total


@pytest.mark.crosscheck
@pytest.mark.parametrize("model_type", MODELS)
def test_a_layer_of_the_model(tmp_path: Path, model_type: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    options, activation = MODELS[model_type]
    # A model type that transformers does not know is a failure: its layers would go unchecked.
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path)

    layer = MoEConfig.from_hf_config(load_hf_config(tmp_path), 1)
    assert (layer.num_experts, layer.num_experts_per_tok, layer.moe_intermediate_size) == (E, P, I)
    assert layer.activation.name == activation
    assert layer.scale_inputs == (model_type == "llama4_text")
    experts = load_experts(tmp_path, 1, layer)

    modules = dict(model.named_modules())
    (name,) = [name for name in modules if name.endswith(".experts") and ".1." in name]
    x = torch.randn(T, layer.hidden_size).bfloat16().float()
    ids = torch.stack([torch.randperm(E)[:P] for _ in range(T)])
    weights = torch.rand(T, P)
    with torch.no_grad():
        expected = run_experts(modules[name], x, ids, weights).numpy()
    got = moe_forward(
        x.numpy().astype(ml_dtypes.bfloat16),
        ids.numpy(),
        weights.numpy(),
        **experts.arguments(),
        activation=layer.activation,
        scale_inputs=layer.scale_inputs,
        out_dtype=np.float32,
    )
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    # An element of the intermediate is rounded by 2^-9 of itself at most.
    assert error < 2.0**-9 * 1.5
