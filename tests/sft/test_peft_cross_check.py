"""Adapters and PEFT itself: for every family that PEFT is said to load, and every one that it is not.

A tiny model with random weights is saved by transformers; adapters of its experts are exported and loaded by
PEFT. What PEFT's experts give is then compared with what ours give, on the model's own hidden states.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cross_checks import COMMON, TOKENS, recorded
from gradient_bound import gradient_balls
from layers import Layer, bf16
from sft_layers import draw_student

from ktmoe_np import KTMoEWrapper
from ktmoe_np.io import load_experts
from ktmoe_np.io.inspect import inspect_checkpoint
from ktmoe_np.reference import LoraWeights, assert_within, moe_forward
from ktmoe_np.sft import export_peft, import_peft, peft_scale
from ktmoe_np.sft.peft_families import LOADED, REFUSED

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.crosscheck, pytest.mark.filterwarnings("ignore")]

E, I, RANK, ALPHA = 6, 24, 3, 4.5  # noqa: E741

HEAD = {"head_dim": 8}
NUMBERED = {"num_experts": E, "moe_intermediate_size": I, "intermediate_size": I}
LOCAL = {"num_local_experts": E, "intermediate_size": I}
ROUTED = {"n_routed_experts": E, "moe_intermediate_size": I, "intermediate_size": I}
DEEPSEEK = {**ROUTED, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}

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
    "jetmoe": LOCAL,
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
}


def random_model(model_type: str, path: Path) -> None:
    """Write a small model of a family. One that transformers does not know is a failure."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **CONFIGS[model_type]})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(path)


def students_of(path: Path) -> list[Any]:
    """The layers with experts, with adapters that do something."""
    rng, layers = np.random.default_rng(1), []
    for found in inspect_checkpoint(path).layers:
        i = found.config.layer_idx
        moe = KTMoEWrapper.from_pretrained(path, i, mode="sft", lora_rank=RANK, lora_alpha=ALPHA)
        drawn = {n: rng.normal(0, x.shape[-1] ** -0.5, x.shape) for n, x in moe.lora_weights.items()}
        moe.init_lora_weights(**{n: x.astype(bf16) for n, x in drawn.items()})
        layers.append(moe)
    assert layers
    return layers


def plain_model(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits_of(model: Any) -> Any:
    torch.manual_seed(2)
    with torch.no_grad():
        return model(torch.randint(2, 64, (1, TOKENS)), use_cache=False).logits


def test_every_family_is_tried() -> None:
    assert CONFIGS.keys() == LOADED.keys() | REFUSED.keys()


@pytest.mark.parametrize("model_type", LOADED)
def test_peft_computes_what_we_do(model_type: str, tmp_path: Path) -> None:
    random_model(model_type, tmp_path / "model")
    layers = students_of(tmp_path / "model")
    export_peft(tmp_path / "adapter", layers)

    model = plain_model(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    names = [n for n, _ in adapted.named_modules() if n.endswith(".experts")]
    assert len(names) == len(layers)
    calls = [recorded(adapted.get_submodule(name)) for name in names]
    logits_of(adapted)
    for moe, calls_of_layer in zip(layers, calls, strict=True):
        call = next(calls_of_layer)
        experts = load_experts(tmp_path / "model", moe.layer_idx, moe.config)
        weights = {name: projection.codes for name, projection in experts.projections.items()}
        slots = dict(zip(("hidden_states", "topk_ids", "topk_weights"), call.batch, strict=True))
        layer = {**slots, **weights, "activation": moe.config.activation}
        lora = LoraWeights(**moe.lora_weights, lora_alpha=ALPHA)
        ball = gradient_balls(
            {**layer, **stacked(weights), "lora": lora}, np.zeros_like(call.batch.x), rounded=False
        )["float32 out"]
        assert_within(call.output, ball.center, ball.radius)
        ours = moe.forward(*call.batch, out=np.empty(call.output.shape, np.float32))
        assert_within(ours, ball.center, ball.radius)
        with pytest.raises(AssertionError, match="outside the bound"):
            assert_within(moe_forward(**layer, out_dtype=np.float32), ball.center, ball.radius)


def stacked(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: np.stack(list(matrices)) for name, matrices in weights.items()}


@pytest.mark.parametrize("model_type", REFUSED)
def test_peft_does_not_load_what_is_refused(model_type: str, tmp_path: Path) -> None:
    """When this fails, PEFT has changed, and the table must."""
    random_model(model_type, tmp_path / "model")
    layers = students_of(tmp_path / "model")
    with pytest.raises(ValueError, match=f"model_type: got '{model_type}', expected one of"):
        export_peft(tmp_path / "adapter", layers)

    # What there would be under the names of either kind.
    modules_found = [loads_without_effect(tmp_path, layers, like) for like in ("qwen3_moe", "mixtral")]
    assert any(modules_found) == ("PEFT finds no module" not in REFUSED[model_type])


def loads_without_effect(path: Path, layers: list[Any], like: str) -> bool:
    """Whether PEFT finds modules for adapters that are named as those of `like`; if so, they do nothing."""
    export_peft(path / like, layers, model_type=like)
    model = plain_model(path / "model")
    before = logits_of(model)
    try:
        adapted = peft.PeftModel.from_pretrained(model, path / like).eval()
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        return False
    assert torch.equal(logits_of(adapted), before)
    return True


# ---- experts that are modules of their own, as in models that bring their code ----


def model_of_modules(layer: Layer) -> Any:
    """The layer as layer 1 of a model, one Linear for each expert and projection."""

    def linear(weight: Any) -> Any:
        module = torch.nn.Linear(*weight.shape[::-1], bias=False)
        module.weight.data = torch.tensor(weight.astype(np.float32))
        return module

    nest, names = torch.nn.ModuleDict, ("gate_proj", "up_proj", "down_proj")
    experts = [
        nest({name: linear(matrix[e]) for name, matrix in zip(names, layer.matrices, strict=True)})
        for e in range(layer.num_experts)
    ]
    mlp = nest({"mlp": nest({"experts": torch.nn.ModuleList(experts)})})
    model = nest({"model": nest({"layers": torch.nn.ModuleList([torch.nn.Identity(), mlp])})})
    model.prepare_inputs_for_generation = None  # PEFT asks a language model for it
    return model


def test_peft_reads_what_we_write_for_modules(tmp_path: Path) -> None:
    student = draw_student(np.random.default_rng(0), (3, 24, 40), RANK)
    export_peft(tmp_path, [student.wrapper(2, layer_idx=1)])
    adapted = peft.PeftModel.from_pretrained(model_of_modules(student.layer), tmp_path)
    for e in range(3):
        for projection in ("gate", "up", "down"):
            module = adapted.get_submodule(
                f"base_model.model.model.layers.1.mlp.experts.{e}.{projection}_proj"
            )
            assert module.scaling["default"] == student.lora_alpha / RANK
            for matrix, part in (("a", module.lora_A), ("b", module.lora_B)):
                expected = student.lora[f"{projection}_lora_{matrix}"][e]
                np.testing.assert_array_equal(part["default"].weight.detach().numpy(), expected)


def test_we_read_what_peft_writes_for_modules(tmp_path: Path) -> None:
    student = draw_student(np.random.default_rng(1), (3, 24, 40), RANK)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=student.lora_alpha,
        lora_dropout=0.25,
        target_modules=["gate_proj", "up_proj", "down_proj"],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model_of_modules(student.layer), config)
    adapted.save_pretrained(tmp_path)
    assert peft_scale(tmp_path) == (RANK, student.lora_alpha)
    moe = student.wrapper(2, layer_idx=1)
    import_peft(tmp_path, [moe])
    state = peft.get_peft_model_state_dict(adapted)
    for name, matrices in moe.lora_weights.items():
        projection, _, matrix = name.split("_")
        for e, read in enumerate(matrices):
            stem = f"base_model.model.model.layers.1.mlp.experts.{e}.{projection}_proj"
            np.testing.assert_array_equal(read, state[f"{stem}.lora_{matrix.upper()}.weight"].numpy())
        assert np.abs(matrices - student.lora[name]).max() > 0.01
