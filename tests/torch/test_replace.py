"""Experts of models of transformers are replaced, and the models are still models of transformers."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch_models import FAMILIES, VOCAB, E, H, I, P, blocks_of, saved_model, tiny_model  # noqa: E402

from ktmoe_np.torch import MoEExperts, register_experts_implementation, replace_experts  # noqa: E402
from ktmoe_np.torch.modules import SeparateExperts  # noqa: E402

pytestmark = pytest.mark.crosscheck

TOKENS = torch.arange(14).reshape(2, 7) % VOCAB


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model("qwen3_moe", tmp_path_factory.mktemp("models"))


def replaced(path: Path, **options: Any) -> Any:
    model = tiny_model("qwen3_moe").requires_grad_(False)
    assert replace_experts(model, path, **{"mode": "sft", "lora_rank": 2, **options}) == 2
    return model


def logits(model: Any, **options: Any) -> Any:
    return model(input_ids=TOKENS, use_cache=False, **options).logits


def loss(model: Any) -> Any:
    return model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss


def enable_checkpointing(model: Any) -> None:
    """By the name that the installed transformers has for it, gradient_checkpointing_enable in older ones."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_agrees_with_the_model(family: str, tmp_path: Path) -> None:
    path, plain, model = saved_model(family, tmp_path), tiny_model(family), tiny_model(family)
    assert replace_experts(model, path) == 2
    assert all(isinstance(block.experts, MoEExperts) for block in blocks_of(model))
    with torch.no_grad():
        error, size = (logits(model) - logits(plain)).norm(), logits(plain).norm()
        rounded = (logits(plain.bfloat16()).float() - logits(tiny_model(family))).norm()
    told = f"{error / size:.3g} of the logits, {rounded / size:.3g} with bfloat16 throughout"
    assert error <= rounded, told


def test_generation(path: Path) -> None:
    model = tiny_model("qwen3_moe")
    replace_experts(model, path)
    found = model.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert found.shape == (2, 10)


def test_gradient_checkpointing(path: Path) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = replaced(path).train()
        if checkpointed:
            enable_checkpointing(model)
            model.enable_input_require_grads()
        loss(model).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 12
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_saved_and_loaded(path: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = replaced(path)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert not [name for name in state if "experts" in name and "lora" not in name]
    fresh = replaced(path)
    missing = fresh.load_state_dict({k: v for k, v in state.items() if "lora" in k}, strict=False)
    assert not missing.unexpected_keys
    assert torch.equal(logits(fresh), logits(model))
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
def test_a_compiled_model_has_one_graph(path: Path) -> None:
    model = replaced(path)
    loss(model).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch._dynamo.reset()
    explained = torch._dynamo.explain(lambda: loss(model))()
    assert explained.graph_break_count == 0, explained.break_reasons
    compiled = torch.compile(lambda: loss(model), backend="aot_eager", fullgraph=True)
    compiled().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, wanted[name])


# ---- the implementation of transformers ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_implementation_that_models_are_set_to(family: str) -> None:
    register_experts_implementation()
    model = tiny_model(family).requires_grad_(False)
    with torch.no_grad():
        plain = logits(model)
    model.set_experts_implementation("ktmoe")
    found = logits(model)
    error = (found - plain).norm()
    with torch.no_grad():
        rounded = (logits(tiny_model(family).bfloat16()).float() - plain).norm()
    assert 0 < error <= rounded
    x = model.get_input_embeddings()(TOKENS).requires_grad_()
    model(inputs_embeds=x, use_cache=False).logits.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_implementation_follows_the_weights(dtype: str) -> None:
    register_experts_implementation()
    model = tiny_model("qwen3_moe").requires_grad_(False).to(getattr(torch, dtype))
    model.set_experts_implementation("ktmoe")
    before = logits(model)
    other, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(blocks_of(model)[0].experts))
    assert torch.equal(pickled.down_proj, blocks_of(model)[0].experts.down_proj)
    with torch.no_grad():
        for block in blocks_of(model):
            block.experts.down_proj.zero_()
    changed = logits(model)
    assert not torch.equal(changed, before)
    assert torch.equal(logits(other), before)


def test_the_implementation_refuses_what_would_lose_gradients() -> None:
    register_experts_implementation()
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation("ktmoe")
    with pytest.raises(RuntimeError, match=r"^experts: got weights that require grad, expected frozen ones"):
        logits(model)
    with torch.no_grad():
        logits(model)


# ---- what is refused ----


class Block(torch.nn.Module):
    """A block of experts that are modules of their own, as transformers had them before 5."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(H, E, bias=False)
        self.experts = torch.nn.ModuleList(Expert() for _ in range(E))

    def forward(self, x: Any) -> Any:
        weights, ids = torch.softmax(self.gate(x), -1).topk(P, dim=-1)
        out = torch.zeros_like(x)
        for e in range(E):
            tokens, slots = torch.where(ids == e)
            out = out.index_add(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class Expert(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(H, I, bias=False) for _ in range(2))
        self.down_proj = torch.nn.Linear(I, H, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class OlderModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_experts_that_are_modules_of_their_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)  # as of an older transformers
    with pytest.raises(ImportError):
        register_experts_implementation()
    plain, model = OlderModel(), OlderModel()
    fused = [block.experts for block in blocks_of(tiny_model("qwen3_moe"))]
    with torch.no_grad():
        for layer, experts in zip(plain.layers, fused, strict=True):
            for e, expert in enumerate(layer.experts):
                expert.gate_proj.weight.copy_(experts.gate_up_proj[e, :I])
                expert.up_proj.weight.copy_(experts.gate_up_proj[e, I:])
                expert.down_proj.weight.copy_(experts.down_proj[e])
    model.load_state_dict(plain.state_dict())
    assert replace_experts(model, path, mode="sft", lora_rank=2) == 2
    assert all(isinstance(layer.experts, SeparateExperts) for layer in model.layers)
    x = torch.randn(10, H, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    torch.testing.assert_close(model(x), plain(x), rtol=0.03, atol=0.03)
    model(x).sum().backward()
    assert model.layers[0].experts.experts.lora["down_lora_b"].grad.any()


def test_models_that_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model: got Linear without routed experts, expected some$"):
        replace_experts(torch.nn.Linear(2, 2), path)
    model = tiny_model("qwen3_moe")
    before = [block.experts for block in blocks_of(model)]
    with pytest.raises(FileNotFoundError):
        replace_experts(model, path / "missing")
    with pytest.raises(ValueError, match=r"lora_rank: got 2 in mode 'inference'"):
        replace_experts(model, path, lora_rank=2)  # type: ignore[call-overload]
    assert [block.experts for block in blocks_of(model)] == before
    mixtral = tiny_model("mixtral")
    for block in blocks_of(mixtral):
        block.experts.down_proj = torch.nn.Parameter(block.experts.down_proj[1:])
    with pytest.raises(ValueError, match=rf"experts: got {E - 1} experts, expected {E}, as at "):
        replace_experts(mixtral, path)


def test_experts_that_are_called_in_another_way(path: Path) -> None:
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    config = Llama4TextConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    model.layers[0].experts = Llama4TextExperts(config)
    message = r"^layers.0.experts: got Llama4TextExperts, called with hidden_states, expected experts that"
    with pytest.raises(NotImplementedError, match=message):
        replace_experts(model, path)
