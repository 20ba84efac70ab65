"""The configuration: names, ranges, and what a Hugging Face config.json turns into."""

from __future__ import annotations

import dataclasses
import doctest
import math
from typing import Any

import numpy as np
import pytest

import ktmoe_np.config
import ktmoe_np.config.activations
from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.config import (
    ActivationSpec,
    MoEConfig,
    activation_kinds,
    activation_names,
    parse_activation,
)

SIZES: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
}


@pytest.mark.parametrize("module", [ktmoe_np.config, ktmoe_np.config.activations])
def test_doctests(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


def test_ids_are_the_order_that_the_core_uses() -> None:
    kinds = tuple(info.name for info in ext.activations())
    assert kinds == activation_kinds()
    assert [parse_activation(kind).kind_id for kind in kinds] == list(range(len(kinds)))


@pytest.mark.parametrize("name", activation_names())
def test_every_name_is_read_back(name: str) -> None:
    spec = parse_activation(name)
    assert spec.name == name
    assert spec.gated == (not name.endswith("_ungated") and name != "relu2")
    assert parse_activation(spec) is spec
    assert parse_activation({"kind": name}) == spec


@pytest.mark.parametrize(
    ("name", "limit", "alpha", "beta1", "beta2"),
    [
        ("silu", math.inf, 1.0, 1.0, 1.0),
        ("swigluoai", 7.0, 1.702, 1.0, 1.0),
        ("swiglustep", 7.0, 1.0, 1.0, 1.0),
        ("situ", math.inf, 1.0, 4.0, 25.0),
        ("gelu", math.inf, 1.0, 1.0, 1.0),
    ],
)
def test_defaults(name: str, limit: float, alpha: float, beta1: float, beta2: float) -> None:
    spec = parse_activation(name)
    assert (spec.limit, spec.alpha, spec.beta1, spec.beta2) == (limit, alpha, beta1, beta2)


def test_options() -> None:
    assert parse_activation({"kind": "silu", "swiglu_limit": 10}).limit == 10.0
    spec = parse_activation({"kind": "swigluoai", "limit": 3.5, "swiglu_alpha": 1.5})
    assert (spec.limit, spec.alpha) == (3.5, 1.5)
    assert parse_activation({"kind": "silu", "gated": False}).name == "silu_ungated"
    assert parse_activation({"kind": "silu_ungated", "gated": True}) == parse_activation("silu")


def test_specs_are_frozen_and_hashable() -> None:
    spec = parse_activation("silu")
    assert hash(spec) == hash(parse_activation("silu"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.limit = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("swish", "activation: got 'swish', expected one of silu, swigluoai, .*, silu_ungated, .*, relu2"),
        ({"kind": "silu", "limt": 3.0}, "activation: got option 'limt', expected one of limit, alpha"),
        ({"kind": "silu", "limit": 0.0}, "activation: got silu with limit=0.0, expected positive"),
        (
            {"kind": "silu", "limit": math.nan},
            "activation: got silu with limit=nan, expected positive",
        ),
        (
            {"kind": "situ", "beta2": math.inf},
            "activation: got situ with beta2=inf, expected positive",
        ),
        ({"kind": "gelu", "limit": 3.0}, "activation: got gelu with limit=3.0, expected no"),
        (
            {"kind": "silu_ungated", "limit": 3.0},
            "activation: got silu_ungated with limit=3.0, expected no",
        ),
        (
            {"kind": "gelu", "gated": False},
            "activation: got gelu without a gate, expected one of silu",
        ),
        ({"kind": "relu2", "gated": True}, "activation: got relu2 with a gate, expected gated=False"),
    ],
)
def test_wrong_values(activation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_activation(activation)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (3, "activation: got 3, expected a name, an ActivationSpec or a mapping .*"),
        ({"limit": 3.0}, "activation: got None, expected a name, .*"),
        ({"kind": "silu", "limit": "3"}, "activation: got silu with limit='3', expected a number"),
        ({"kind": "silu", "limit": True}, "activation: got silu with limit=True, expected a number"),
        ({"kind": "silu", "gated": 0}, "activation: got silu with gated=0, expected a bool"),
    ],
)
def test_wrong_types(activation: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        parse_activation(activation)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="activation: got 'swish', expected one of silu, swigluoai"):
        ActivationSpec("swish", gated=True, limit=math.inf, alpha=1.0, beta1=1.0, beta2=1.0)


def test_layer_config() -> None:
    config = MoEConfig(**{**SIZES, "num_experts": np.int64(8), "layer_idx": np.int32(3)})
    assert config == MoEConfig(**SIZES, layer_idx=3)
    assert type(config.num_experts) is int
    assert type(config.layer_idx) is int
    assert config.activation == parse_activation("silu")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, ": got 0, expected at least 1"),
        (-3, ValueError, ": got -3, expected at least 1"),
        (2.0, TypeError, ": got 2.0, expected an integer"),
        (True, TypeError, ": got True, expected an integer"),
        ("8", TypeError, ": got '8', expected an integer"),
    ],
)
def test_wrong_sizes(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{name}{message}"):
        MoEConfig(**{**SIZES, name: value})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer_idx": -1}, ValueError, "layer_idx: got -1, expected at least 0"),
        ({"layer_idx": 1.0}, TypeError, "layer_idx: got 1.0, expected an integer"),
        ({"activation": "silu"}, TypeError, "activation: got 'silu', expected an ActivationSpec"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MoEConfig(**SIZES, **options)


#: What the hub's files say, shortened to what matters; then E, P, H, I and the activation of layer 1.
HF_CONFIGS: dict[str, tuple[dict[str, Any], tuple[int, int, int, int], Any]] = {
    "Mixtral": (
        {"num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 4096, "intermediate_size": 14336,
         "hidden_act": "silu"},
        (8, 2, 4096, 14336), "silu",
    ),
    "Qwen3-30B-A3B": (
        {"num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 768,
         "intermediate_size": 6144, "hidden_act": "silu"},
        (128, 8, 2048, 768), "silu",
    ),
    "Qwen3.5": (
        {"model_type": "qwen3_5_moe", "vision_config": {"hidden_size": 1152}, "text_config": {
            "num_experts": 256, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 512,
            "hidden_act": "silu"}},
        (256, 8, 2048, 512), "silu",
    ),
    "Qwen3-Omni": (
        {"thinker_config": {"text_config": {
            "num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048,
            "moe_intermediate_size": 768}}},
        (128, 8, 2048, 768), "silu",
    ),
    "DeepSeek-V3": (
        {"n_routed_experts": 256, "num_experts_per_tok": 8, "hidden_size": 7168, "n_shared_experts": 1,
         "moe_intermediate_size": 2048, "intermediate_size": 18432, "hidden_act": "silu"},
        (256, 8, 7168, 2048), "silu",
    ),
    "DeepSeek-V4": (
        {"n_routed_experts": 256, "num_experts_per_tok": 6, "hidden_size": 4096, "hidden_act": "silu",
         "moe_intermediate_size": 2048, "swiglu_limit": 10.0},
        (256, 6, 4096, 2048), {"kind": "silu", "limit": 10.0},
    ),
    "gpt-oss": (
        {"model_type": "gpt_oss", "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4,
         "hidden_size": 2880, "intermediate_size": 2880, "hidden_act": "silu", "swiglu_limit": 7.0},
        (32, 4, 2880, 2880), "swigluoai",
    ),
    "MiniMax-M3": (
        {"text_config": {"num_local_experts": 128, "num_experts_per_tok": 4, "hidden_size": 6144,
         "intermediate_size": 3072, "hidden_act": "swigluoai", "swiglu_alpha": 1.702, "swiglu_limit": 7.0}},
        (128, 4, 6144, 3072), "swigluoai",
    ),
    "Kimi-K3": (
        {"text_config": {"num_experts": 896, "num_experts_per_token": 16, "hidden_size": 7168,
         "routed_expert_hidden_size": 3584, "moe_intermediate_size": 3072, "intermediate_size": 33792,
         "hidden_act": "situ", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0}},
        (896, 16, 3584, 3072), "situ",
    ),
    "Gemma-4": (
        {"text_config": {"num_experts": 128, "top_k_experts": 8, "hidden_size": 2816,
         "moe_intermediate_size": 704, "intermediate_size": 2112, "hidden_activation": "gelu_pytorch_tanh"}},
        (128, 8, 2816, 704), "gelu_tanh",
    ),
    "Nemotron-3": (
        {"n_routed_experts": 512, "num_experts_per_tok": 22, "hidden_size": 4096, "moe_latent_size": 1024,
         "moe_intermediate_size": 2688, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"},
        (512, 22, 1024, 2688), "relu2",
    ),
    "Step-3.5, without a clamp": (
        {"moe_num_experts": 288, "moe_top_k": 8, "hidden_size": 4096, "moe_intermediate_size": 1280,
         "intermediate_size": 11264, "num_hidden_layers": 3, "swiglu_limits": [0.0, 0.0, 7.0]},
        (288, 8, 4096, 1280), "silu",
    ),
    "Step-3.5, with a clamp": (
        {"moe_num_experts": 288, "moe_top_k": 8, "hidden_size": 4096, "moe_intermediate_size": 1280,
         "num_hidden_layers": 3, "swiglu_limits": [0.0, 16.0, None]},
        (288, 8, 4096, 1280), {"kind": "swiglustep", "limit": 16.0},
    ),
    "ERNIE-4.5": (
        {"moe_num_experts": 64, "moe_k": 6, "hidden_size": 2560, "moe_intermediate_size": 1536,
         "intermediate_size": 12288, "hidden_act": "silu"},
        (64, 6, 2560, 1536), "silu",
    ),
    "Hunyuan-A13B": (
        {"num_experts": 64, "moe_topk": [8, 7], "hidden_size": 4096, "moe_intermediate_size": [3072, 3000],
         "intermediate_size": 3072, "num_hidden_layers": 2, "hidden_act": "silu"},
        (64, 7, 4096, 3000), "silu",
    ),
    "LongCat-Flash": (
        {"n_routed_experts": 512, "moe_topk": 12, "hidden_size": 6144, "ffn_hidden_size": 12288,
         "expert_ffn_hidden_size": 2048},
        (512, 12, 6144, 2048), "silu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", HF_CONFIGS)
def test_hf_config(model: str) -> None:
    config, sizes, activation = HF_CONFIGS[model]
    assert MoEConfig.from_hf_config(config, 1) == MoEConfig(*sizes, parse_activation(activation), layer_idx=1)


@pytest.mark.parametrize(
    ("model_types", "scale_inputs"),
    [
        (("llama4_text", None), True),
        (("llama4", "llama4_text"), True),
        (("llama4", None), True),
        (("llama", None), False),
        (("qwen3_moe", None), False),
    ],
)
def test_routing_weights_that_scale_inputs(model_types: tuple[str, str | None], scale_inputs: bool) -> None:
    sizes = {"num_local_experts": 16, "num_experts_per_tok": 1, "hidden_size": 64, "intermediate_size": 32}
    outer, inner = model_types
    config = {"model_type": outer, **sizes}
    if inner is not None:
        config = {"model_type": outer, "text_config": {"model_type": inner, **sizes}}
    elif outer == "llama4":
        config = {"model_type": outer, "text_config": sizes}
    assert MoEConfig.from_hf_config(config, 0).scale_inputs is scale_inputs


HF_BASE = {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_experts": None, "model_type": "llama"},
            "got no number of experts .model_type 'llama'.,",
        ),
        ({"num_experts_per_tok": None}, "config: got no num_experts_per_tok, expected one of .*moe_k"),
        ({"hidden_size": None}, "config: got no hidden_size, expected one of .*hidden_size"),
        ({"moe_intermediate_size": None}, "config: got no moe_intermediate_size, .*intermediate_size"),
        ({"n_routed_experts": 9}, "config: num_experts: got num_experts=8, n_routed_experts=9, expected"),
        ({"num_experts": 0}, "num_experts: got 0, expected at least 1"),
        ({"hidden_act": "quick_gelu"}, "config: activation: got 'quick_gelu', expected one of silu"),
        (
            {"hidden_act": "gelu", "swiglu_limit": 7.0},
            "activation: got gelu with limit=7.0, expected no limit",
        ),
        (
            {"hidden_act": "situ", "activation_situ_beta": 4.0},
            "config: activation_situ_linear_beta: got none",
        ),
        (
            {"moe_intermediate_size": [32, 32], "num_hidden_layers": 3},
            "config: moe_intermediate_size: got 2 values, expected one for each of 3 layers",
        ),
        ({"moe_intermediate_size": [32]}, "got values for layers 0 to 0, expected one for layer 1"),
    ],
)
def test_wrong_hf_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig.from_hf_config({**HF_BASE, **change}, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "config: got list, expected a mapping .*"),
        ({**HF_BASE, "num_experts": "8"}, "num_experts: got '8', expected an integer"),
        ({**HF_BASE, "swiglu_limit": "7"}, "activation: got silu with limit='7', expected a number"),
    ],
)
def test_hf_config_of_wrong_types(config: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MoEConfig.from_hf_config(config, 1)


@pytest.mark.parametrize("kind", activation_kinds())
def test_a_config_may_name_every_kind(kind: str) -> None:
    betas = {"activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0}
    layer = MoEConfig.from_hf_config({**SIZES, "hidden_act": kind, **betas}, 0)
    assert layer.activation == parse_activation(kind)
