"""The engine against the model code of transformers, on checkpoints that transformers has written.

A tiny model with random weights is saved and then run in float32 on random tokens, except that what goes
into its experts is rounded to bfloat16 first, as the engine takes it. So routers, hidden states and routing
weights are the model's own, and so are all files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cross_checks import COMMON, LAYERS, TOKENS, Call, recorded, rounding_of_the_intermediate
from layers import assert_same_bits, bf16

from ktmoe_np import KTMoEWrapper
from ktmoe_np.io import load_experts
from ktmoe_np.reference import assert_within, error_bound

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.crosscheck, pytest.mark.filterwarnings("ignore")]

AnyArray = Any

NUM_EXPERTS = 6

#: model_type -> the rest of its configuration.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 24, "head_dim": 8},
    "mixtral": {"num_local_experts": NUM_EXPERTS, "intermediate_size": 24},
    "gpt_oss": {"num_local_experts": NUM_EXPERTS, "intermediate_size": 24, "head_dim": 8},
    "olmoe": {"num_experts": NUM_EXPERTS, "intermediate_size": 24},
    "deepseek_v3": {
        "n_routed_experts": NUM_EXPERTS,
        "moe_intermediate_size": 24,
        "intermediate_size": 24,
        "first_k_dense_replace": 0,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "routed_scaling_factor": 2.5,
    },
}


@dataclass
class Model:
    path: Path
    calls: list[Call]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    model_type = request.param
    # A model type that transformers does not know is a failure: its layers would go unchecked.
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **MODELS[model_type]})
    torch.manual_seed(0)
    # In bfloat16 the weights are what the engine sees; the experts run eagerly, where the hooks are.
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3)
    path = tmp_path_factory.mktemp(model_type)
    made.save_pretrained(path)

    made = made.float().eval()
    names = [name for name, _ in made.named_modules() if name.endswith(".experts")]
    assert len(names) == LAYERS
    calls = [recorded(made.get_submodule(name)) for name in names]
    with torch.no_grad():
        made(torch.randint(2, 64, (1, TOKENS)))
    return Model(path, [next(calls_of_layer) for calls_of_layer in calls])


@pytest.mark.parametrize("layer_idx", range(LAYERS))
def test_a_layer(model: Model, layer_idx: int) -> None:
    call = model.calls[layer_idx]
    moe = KTMoEWrapper.from_pretrained(model.path, layer_idx)
    assert moe.loaded
    assert moe.layer_idx == layer_idx
    assert len(np.unique(call.batch.ids)) > 2
    got = moe.forward(*call.batch, out=np.empty(call.output.shape, np.float32))

    experts, activation = load_experts(model.path, layer_idx, moe.config), moe.config.activation
    bound = error_bound(
        *call.batch,
        **experts.arguments(),
        activation=activation,
        out_dtype=np.float32,
    )
    rounding = rounding_of_the_intermediate(experts, call.batch, activation)
    assert_within(got, call.output, bound + rounding)
    # The bound assumes the worst of all roundings at once; typically they cancel.
    error = np.linalg.norm(got - call.output) / np.linalg.norm(call.output)
    assert error < 2.0**-8

    assert_same_bits(moe.forward(*call.batch), got.astype(bf16))
    again = KTMoEWrapper.from_pretrained(model.path, layer_idx)
    again.load_weights()  # loaded already
    assert_same_bits(again.forward(*call.batch), got.astype(bf16))


def test_a_layer_by_its_sizes(model: Model) -> None:
    """Without reading the configuration, as KTransformers makes its layers."""
    first = KTMoEWrapper.from_pretrained(model.path, 1)
    config = first.config
    moe = KTMoEWrapper(
        layer_idx=1,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_intermediate_size,
        weight_path=model.path,
        activation=config.activation,
        method="BF16",
    )
    assert not moe.loaded
    order = np.arange(config.num_experts)[::-1].copy()
    moe.load_weights(order)
    batch = model.calls[1].batch
    reversed_ids = batch._replace(ids=config.num_experts - 1 - batch.ids)
    assert_same_bits(moe.forward(*reversed_ids), first.forward(*batch))


def test_a_layer_that_is_not_there(model: Model) -> None:
    with pytest.raises(ValueError, match=f"layer {LAYERS} has no experts; layers with experts: 0, 1"):
        KTMoEWrapper.from_pretrained(model.path, LAYERS)
