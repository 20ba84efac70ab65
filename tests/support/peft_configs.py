"""Configurations of tiny models of every family whose experts PEFT adapts, beside those of `cross_checks`."""

from __future__ import annotations

from typing import Any

__all__ = ["CONFIGS", "E", "I"]

E, I = 6, 24  # noqa: E741


HEAD = {"head_dim": 8}
NUMBERED = {"num_experts": E, "moe_intermediate_size": I, "intermediate_size": I}
LOCAL = {"num_local_experts": E, "intermediate_size": I}
ROUTED = {"n_routed_experts": E, "moe_intermediate_size": I, "intermediate_size": I}
DEEPSEEK = {**ROUTED, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8}
FULL, SPARSE = ["full_attention"] * 2, ["sparse"] * 2

#: model_type -> the rest of its configuration.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**NUMBERED, **HEAD},
    "qwen3_next": {**NUMBERED, **HEAD},
    "olmoe": NUMBERED,
    "flex_olmo": NUMBERED,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": DEEPSEEK,
    "glm4_moe": {**ROUTED, **HEAD, "first_k_dense_replace": 0},
    "glm4_moe_lite": DEEPSEEK,
    "ernie4_5_moe": {"moe_num_experts": E, "moe_k": 2, "moe_intermediate_size": I, "intermediate_size": I},
    "hunyuan_v1_moe": {"num_experts": E, "moe_topk": 2, "intermediate_size": I, **HEAD},
    "exaone_moe": {**NUMBERED, **HEAD},
    "solar_open": {**ROUTED, **HEAD, "n_group": 1, "topk_group": 1},
    "cohere2_moe": {**NUMBERED, **HEAD},
    "afmoe": {**NUMBERED, **HEAD, "num_dense_layers": 0},
    "mixtral": LOCAL,
    "minimax": {**LOCAL, **HEAD},
    "minimax_m2": {**LOCAL, **HEAD, "rotary_dim": 8},
    "phimoe": LOCAL,
    "granitemoe": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": I},
    "granitemoehybrid": {
        **LOCAL,
        "shared_intermediate_size": I,
        "layer_types": ["attention"] * 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 20,
    },
    "gpt_oss": {**LOCAL, **HEAD},
    "jamba": {**NUMBERED, "mamba_d_state": 4},
    "lfm2_moe": {**NUMBERED, "num_dense_layers": 0, "layer_types": ["full_attention"] * 2},
    "qwen2_moe": {**NUMBERED, "shared_expert_intermediate_size": I},
    "qwen3_5_moe_text": {**NUMBERED, **HEAD},
    "deepseek_v4": ROUTED,
    "nemotron_h": {
        **ROUTED,
        **HEAD,
        "layers_block_type": ["mamba", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
        "moe_shared_expert_intermediate_size": I,
    },
    "llama4_text": {**LOCAL, **HEAD, "intermediate_size_mlp": I},
    "gemma4_text": {
        "num_experts": E,
        "top_k_experts": 2,
        "moe_intermediate_size": I,
        "enable_moe_block": True,
        "intermediate_size": I,
        "hidden_size_per_layer_input": 0,
        **HEAD,
    },
    "aria_text": {"moe_num_experts": E, "moe_topk": 2, "intermediate_size": I},
    "minimax_m3_vl_text": {**LOCAL, **HEAD},
    "axk1": {**ROUTED, **LATENT},
    "axk2": {**ROUTED, **LATENT, "num_local_experts": E},
    "bailing_hybrid": {**NUMBERED, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
    "beam": {**NUMBERED, **HEAD, "layer_types": FULL, "mlp_layer_types": SPARSE},
    "dots1": {**DEEPSEEK, **HEAD, "n_shared_experts": 1},
    "dots3_note_text": {**DEEPSEEK, **LATENT},
    "flint": {**NUMBERED, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "glm_moe_dsa": {
        **DEEPSEEK,
        **LATENT,
        "mlp_layer_types": SPARSE,
        "index_head_dim": 16,
        "index_n_heads": 2,
    },
    "granitemoe_swa": LOCAL,
    "hy_v3": {**NUMBERED, **HEAD},
    "hy_v4": {**NUMBERED, "num_local_experts": E},
    "inkling_text": ROUTED,
    "kimi_linear": {**NUMBERED, **HEAD, "layer_types": FULL},
    "kolibri1": NUMBERED,
    "laguna": {**NUMBERED, **HEAD},
    "lara_mini": NUMBERED,
    "mellum": NUMBERED,
    "mimo_v2_flash": {**ROUTED, "num_local_experts": E},
    "qwen4_exp_text": NUMBERED,
    "zaya": {**NUMBERED, "num_experts_per_tok": 1},
}
