"""The engine against Llama-4's block of experts in transformers: forward, and gradients by autograd.

A tiny model with random weights is saved as transformers saves it. Its block is then run without the shared
expert, which is the caller's, on tokens and routing scores of which autograd takes the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cross_checks import COMMON, TOKENS, rounding_of_the_intermediate
from gradient_bound import gradient_balls
from layers import AnyArray, Batch, Layer, bf16
from sft_layers import Student, by_name

from ktmoe_np import KTMoEWrapper
from ktmoe_np.formats.weights import ExpertWeights, Projection
from ktmoe_np.io import load_experts
from ktmoe_np.reference import assert_within, error_bound

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.crosscheck, pytest.mark.filterwarnings("ignore")]

LAYER, E = 1, 6


@dataclass
class Block:
    """A model on disk, its block of experts, and a batch by the model's own router."""

    path: Path
    module: Any
    batch: Batch
    scores: Any  # [T, E]: sigmoids of the experts that a token goes to, 0 for the others

    def run(self, dtype: Any, *, rounded: bool) -> tuple[Any, Any, Any]:
        """The block's output, its input and its scores; the scaled inputs rounded to bfloat16 or not."""
        module, routed = self.module.to(dtype), torch.tensor(self.batch.x.astype(np.float32)).to(dtype)
        x = routed.requires_grad_()
        scores = self.scores.clone().to(dtype).requires_grad_()
        module.router.forward = lambda _: (scores, None)
        hook = module.experts.register_forward_pre_hook(
            lambda _, args: (args[0].bfloat16().to(dtype),) if rounded else None
        )
        out = module(x)[0]
        hook.remove()
        return out, x, scores


class _Nothing(torch.nn.Module):  # type: ignore[misc, name-defined]
    def forward(self, x: Any) -> Any:
        return torch.zeros_like(x)


@pytest.fixture(scope="module", params=[1, 2])
def block(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Block:
    sizes = {"num_local_experts": E, "intermediate_size": 24, "intermediate_size_mlp": 32, "head_dim": 8}
    own = {**sizes, "num_experts_per_tok": request.param}
    config = transformers.AutoConfig.for_model("llama4_text", **{**COMMON, **own})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    path = tmp_path_factory.mktemp("llama4")
    model.save_pretrained(path)

    (module,) = [m for m in model.modules() if type(m).__name__ == "Llama4TextMoe"][LAYER : LAYER + 1]
    x = torch.randn(TOKENS, config.hidden_size).bfloat16()
    with torch.no_grad():
        scores = module.float().router(x.float())[0]
    module.shared_expert = _Nothing()
    weights, ids = scores.topk(request.param, dim=1)
    batch = Batch(x.float().numpy().astype(bf16), ids.numpy(), weights.numpy())
    return Block(path, module, batch, scores)


def loaded(block: Block, **options: Any) -> tuple[Any, Layer]:
    """The layer, and its weights."""
    moe = KTMoEWrapper.from_pretrained(block.path, LAYER, **options)
    experts = load_experts(block.path, LAYER, moe.config)
    matrices = (np.stack(projection.codes) for projection in experts.projections.values())
    return moe, Layer(*matrices, activation=moe.config.activation, scale_inputs=True)


def test_forward(block: Block) -> None:
    moe, layer = loaded(block)
    assert moe.config.scale_inputs
    got = moe.forward(*block.batch, out=np.empty(block.batch.x.shape, np.float32))
    with torch.no_grad():
        expected = block.run(torch.float32, rounded=True)[0].numpy()
    bound = error_bound(
        *block.batch, *layer.matrices, activation=layer.activation, scale_inputs=True, out_dtype=np.float32
    )
    assert_within(got, expected, bound + rounding(block, layer))
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < 2.0**-8


def test_weights_on_the_outputs_are_another_model(block: Block) -> None:
    moe = KTMoEWrapper.from_pretrained(block.path, LAYER, scale_inputs=False)
    got = moe.forward(*block.batch, out=np.empty(block.batch.x.shape, np.float32))
    with torch.no_grad():
        expected = block.run(torch.float32, rounded=True)[0].numpy()
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) > 0.05


def rounding(block: Block, layer: Layer) -> AnyArray:
    """How far the rounding of h, which the model does not do, may take a token."""
    x, ids, weights = block.batch
    total = np.zeros(x.shape)
    for p in range(ids.shape[1]):
        rows = (weights[:, p, None] * x.astype(np.float32)).astype(bf16)
        slots = Batch(rows, ids[:, p : p + 1], np.ones((len(x), 1), np.float32))
        gate, up, down = map(Projection, layer.matrices)
        experts = ExpertWeights(gate=gate, up=up, down=down)
        total += rounding_of_the_intermediate(experts, slots, layer.activation)
    return total


def test_gradients(block: Block) -> None:
    """Within what the roundings of a training step allow of float64 autograd, which has none."""
    moe, layer = loaded(block, mode="sft", method="AMXBF16_SFT", lora_rank=0, full_weight_grad=True)
    rng = np.random.default_rng(0)
    grad_output = rng.standard_normal(block.batch.x.shape, np.float32).astype(bf16)
    moe.forward_sft(*block.batch)
    got = by_name(moe.backward(grad_output))

    block.module.zero_grad()
    out, x, scores = block.run(torch.float64, rounded=False)
    out.backward(torch.tensor(grad_output.astype(np.float64)))
    gate_up, down = block.module.experts.gate_up_proj.grad, block.module.experts.down_proj.grad
    gate, up = gate_up.transpose(1, 2).chunk(2, dim=1)
    expected = {
        "grad_input": x.grad,
        "grad_weights": scores.grad.gather(1, torch.tensor(block.batch.ids)),
        "gate_proj": gate,
        "up_proj": up,
        "down_proj": down.transpose(1, 2),
    }
    assert got.keys() == expected.keys()
    balls = gradient_balls(Student(layer, {}, 0).reference(block.batch), grad_output, rounded=False)
    for name, value in expected.items():
        np.testing.assert_allclose(balls[name].center, value.numpy(), rtol=1e-9, atol=1e-9, err_msg=name)
        assert_within(got[name], value.numpy(), balls[name].radius)
        error = np.linalg.norm(got[name] - value.numpy()) / np.linalg.norm(value.numpy())
        assert error < 2.0**-6, name
