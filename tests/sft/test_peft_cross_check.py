"""Adapters and PEFT itself: for every family that PEFT is said to load, and every one that it is not.

A tiny model with random weights is saved by transformers; adapters of its experts are exported and loaded by
PEFT. What PEFT's experts give is then compared with what ours give, on the model's own hidden states.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cross_checks import COMMON, TOKENS
from gradient_bound import gradient_balls
from layers import Batch, Layer, assert_same_bits, bf16
from peft_configs import CONFIGS, E
from sft_layers import draw_student

from ktmoe_np import KTMoEWrapper
from ktmoe_np.cli import main
from ktmoe_np.io import load_experts
from ktmoe_np.io.inspect import inspect_checkpoint
from ktmoe_np.models import EMBEDDED_MODEL, MoEDecoder
from ktmoe_np.reference import LoraWeights, assert_within, moe_forward
from ktmoe_np.sft import export_peft, import_peft, peft_scale
from ktmoe_np.sft.peft import FAMILIES, REFUSED, SEPARATE_REFUSED

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.crosscheck, pytest.mark.filterwarnings("ignore")]

RANK, ALPHA = 3, 4.5


def random_model(model_type: str) -> Any:
    """A small model of a family. One that transformers does not know is a failure."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **CONFIGS[model_type]})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


class Case:
    """A model of a family, in float32 with numbers of bfloat16, and its checkpoint."""

    def __init__(self, model_type: str, path: Path) -> None:
        self.model_type, self.path = model_type, path
        model = random_model(model_type)
        model.save_pretrained(path)
        self._model = model.float().requires_grad_(False)

    def model(self) -> Any:
        """The model, which PEFT will change."""
        return copy.deepcopy(self._model)

    def layers(self, rank: int = RANK, alpha: float = ALPHA, *, drawn: bool = False) -> list[Any]:
        """The layers with experts, with first adapters, or with some that do something."""
        rng, layers = np.random.default_rng(1), []
        for found in inspect_checkpoint(self.path).layers:
            i = found.config.layer_idx
            moe = KTMoEWrapper.from_pretrained(self.path, i, mode="sft", lora_rank=rank, lora_alpha=alpha)
            if drawn:
                matrices = {
                    n: rng.normal(0, x.shape[-1] ** -0.5, x.shape) for n, x in moe.lora_weights.items()
                }
                moe.init_lora_weights(**{n: x.astype(bf16) for n, x in matrices.items()})
            layers.append(moe)
        assert layers
        return layers


#: Tried in every run: each layout, and what differs in names. The others are tried before a release.
ALWAYS = (
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "llama4_text",
    "nemotron_h",
    "granitemoe",
    "jamba",
    "gemma4_text",
)


def some_in_every_run(names: Iterable[str]) -> list[Any]:
    """Families as parameters."""
    return [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.release) for name in names]


@pytest.fixture(scope="module", params=some_in_every_run(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=some_in_every_run(n for n, each in FAMILIES.items() if each.separate))
def separate_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("model"))


def loaded_by_peft(model: Any, path: Path) -> Any:
    """The model with adapters, all of which PEFT has found a place for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        return peft.PeftModel.from_pretrained(model, path, is_trainable=True).eval()


def experts_of(adapted: Any) -> list[Any]:
    """The modules of experts that PEFT has wrapped, by layer."""
    return [x for name, x in adapted.named_modules() if name.endswith(".experts")]


def batch_of(hidden_size: int, seed: int, per_token: int = 1) -> Batch:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(E)[:per_token] for _ in range(TOKENS)])
    x = rng.normal(0, 1, (TOKENS, hidden_size)).astype(bf16)
    return Batch(x, ids, rng.uniform(0.1, 1, ids.shape).astype(np.float32))


def run_experts(module: Any, batch: Batch, scale_inputs: bool) -> Any:
    """What a module of experts makes of a batch, as its block calls it."""
    x, ids, weights = (torch.tensor(np.asarray(each, np.float32)) for each in batch)
    ids = ids.long()
    if not scale_inputs:
        return module(x, ids, weights)
    total = torch.zeros(x.shape)
    for p in range(ids.shape[1]):
        scaled = (weights[:, p, None] * x).bfloat16().float()
        every = module(scaled.repeat(E, 1)).view(E, *x.shape)
        total = total + every[ids[:, p], torch.arange(len(x))]
    return total


def assert_same_experts(case: Case, adapted: Any, layers: list[Any]) -> None:
    """The experts of the two give the same, up to the rounding of sums; without adapters they would not."""
    modules = experts_of(adapted)
    assert len(modules) == len(layers)
    for module, moe in zip(modules, layers, strict=True):
        config = moe.config
        batch = batch_of(config.hidden_size, moe.layer_idx, config.num_experts_per_tok)
        with torch.no_grad():
            theirs = run_experts(module, batch, config.scale_inputs).numpy()
        weights = load_experts(case.path, moe.layer_idx, config).arguments()
        slots = dict(zip(("hidden_states", "topk_ids", "topk_weights"), batch, strict=True))
        options = {"activation": config.activation, "scale_inputs": config.scale_inputs}
        no_up = {"up_lora_a": None, "up_lora_b": None}
        lora = LoraWeights(**{**no_up, **moe.lora_weights}, lora_alpha=moe.options.lora_alpha)
        layer = {**slots, **stacked(weights), **options, "lora": lora}
        ball = gradient_balls(layer, np.zeros_like(batch.x), rounded=False)["float32 out"]
        assert_within(theirs, ball.center, ball.radius)
        ours = moe.forward(*batch, out=np.empty(theirs.shape, np.float32))
        assert_within(ours, ball.center, ball.radius)
        with pytest.raises(AssertionError, match="outside the bound"):
            assert_within(
                moe_forward(**slots, **weights, **options, out_dtype=np.float32), ball.center, ball.radius
            )


def stacked(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: None if x is None else np.stack(list(x)) for name, x in weights.items()}


def train(adapted: Any, scale_inputs: bool) -> None:
    """Steps of SGD on what the experts give, so that every adapter moves, then rounded to bfloat16."""
    trained = [p for p in adapted.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        for module in experts_of(adapted):
            batch = batch_of(COMMON["hidden_size"], step)
            y = run_experts(module, batch, scale_inputs)
            (y.square().sum() / y.detach().square().sum()).backward()
        optimizer.step()
    with torch.no_grad():
        for p, old in zip(trained, before, strict=True):
            assert not torch.equal(p, old)
            p.copy_(p.bfloat16())


def imported(case: Case, path: Path) -> list[Any]:
    rank, alpha = peft_scale(path)
    layers = case.layers(rank, alpha)
    import_peft(path, layers)
    return layers


def test_every_family_is_tried() -> None:
    assert CONFIGS.keys() == FAMILIES.keys()
    assert SEPARATE_REFUSED.keys() == {name for name, each in FAMILIES.items() if each.separate is None}


def families_of_transformers() -> set[str]:
    """The model types of text whose code has experts under the interface of transformers, and three more."""
    folder = Path(transformers.__file__).parent / "models"
    with_experts = {"llama4", "dbrx", "jetmoe"} | {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if "\n@use_experts_implementation" in path.read_text()
    }
    auto = transformers.models.auto.configuration_auto
    other = re.compile("_vision|_audio|_encoder")
    return {
        name
        for name in auto.CONFIG_MAPPING_NAMES
        if auto.model_type_to_module_name(name) in with_experts and not other.search(name)
    }


def test_the_table_has_every_family_of_transformers() -> None:
    known = FAMILIES.keys() | REFUSED.keys()
    found = families_of_transformers()
    assert len(found) > 60
    assert known == found
    assert not FAMILIES.keys() & REFUSED.keys()


def test_peft_computes_what_we_do(case: Case, tmp_path: Path) -> None:
    layers = case.layers(drawn=True)
    export_peft(tmp_path, layers)
    assert_same_experts(case, loaded_by_peft(case.model(), tmp_path), layers)
    again = imported(case, tmp_path)
    for moe, other in zip(layers, again, strict=True):
        for name, matrix in moe.lora_weights.items():
            assert_same_bits(other.lora_weights[name], matrix, name)


def test_we_compute_what_peft_has_trained(case: Case, tmp_path: Path) -> None:
    first = "gate_up_proj" if FAMILIES[case.model_type].gated else "up_proj"
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[],
        target_parameters=[f"experts.{first}", "experts.down_proj"],
        init_lora_weights=False,
    )
    torch.manual_seed(3)
    adapted = peft.get_peft_model(case.model(), config)
    train(adapted, case.model_type == "llama4_text")
    adapted.save_pretrained(tmp_path)
    layers = imported(case, tmp_path)
    assert layers[0].options.lora_rank == RANK
    assert_same_experts(case, adapted, layers)


def test_peft_converts_adapters_of_one_linear_each(separate_case: Case, tmp_path: Path) -> None:
    """What it makes of them comes back too: gate and up apart, and after training together."""
    case = separate_case
    layers = case.layers(drawn=True)
    export_peft(tmp_path / "separate", layers, layout="per_expert")
    adapted = loaded_by_peft(case.model(), tmp_path / "separate")
    assert_same_experts(case, adapted, layers)
    assert_same_experts(case, adapted, imported(case, tmp_path / "separate"))

    adapted.save_pretrained(tmp_path / "converted")
    config = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    assert list(config["rank_pattern"].values()) == [2 * RANK]
    for moe, other in zip(layers, imported(case, tmp_path / "converted"), strict=True):
        for name, matrix in moe.lora_weights.items():
            assert_same_bits(other.lora_weights[name].astype(bf16), matrix, name)

    train(adapted, scale_inputs=False)
    adapted.save_pretrained(tmp_path / "trained")
    together = imported(case, tmp_path / "trained")
    assert together[0].options.lora_rank == 2 * RANK
    assert_same_experts(case, adapted, together)


@pytest.mark.parametrize("model_type", some_in_every_run(SEPARATE_REFUSED))
def test_peft_does_not_load_what_is_refused(model_type: str, tmp_path: Path) -> None:
    """When this fails, PEFT has changed, and the table must."""
    case = Case(model_type, tmp_path / "model")
    layers = case.layers(drawn=True)
    with pytest.raises(ValueError, match=f"model_type: got '{model_type}', expected one of .*per_expert"):
        export_peft(tmp_path / "adapter", layers, layout="per_expert")

    # What there would be under the names of either kind.
    modules_found = [loads_without_effect(case, tmp_path, layers, like) for like in ("qwen3_moe", "mixtral")]
    assert any(modules_found) == ("PEFT finds no module" not in SEPARATE_REFUSED[model_type])


def loads_without_effect(case: Case, path: Path, layers: list[Any], like: str) -> bool:
    """Whether PEFT finds modules for adapters named as those of `like`; none are the routed experts."""
    export_peft(path / like, layers, layout="per_expert", model_type=like)
    try:
        adapted = peft.PeftModel.from_pretrained(case.model(), path / like).eval()
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        return False
    names = [name for name, _ in adapted.named_parameters() if ".lora_" in name]
    assert names
    assert not any(".experts." in name for name in names)
    return True


# ---- what the command writes and takes ----


def finetuned(path: Path) -> list[str]:
    """The lines of a `ktmoe finetune` that has nothing to write to."""
    text = path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    out = path / "adapter"
    options = ["--rank=2", "--steps=2", "--batch=1", "--window=16", "--rate=0.02", "--every=2"]
    return ["finetune", "--text", str(text), "--out", str(out), *options, "--json"]


def next_logits(adapter: Path) -> Any:
    """Of the embedded model with these adapters."""
    model = MoEDecoder.from_pretrained(adapter=adapter)
    (logits,) = model.forward([TEXT], [model.new_cache()])
    return logits


TEXT = np.arange(3, 15)


def test_a_finetuned_adapter_is_a_model_of_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(finetuned(tmp_path)) == 0
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    assert auto.peft_config["default"].base_model_name_or_path == str(EMBEDDED_MODEL)
    assert len(experts_of(auto)) == auto.config.num_hidden_layers
    with torch.no_grad():
        theirs = auto(torch.tensor(TEXT)[None], use_cache=False).logits[0].numpy()
        with auto.disable_adapter():
            plain = auto(torch.tensor(TEXT)[None], use_cache=False).logits[0].numpy()
    ours = next_logits(tmp_path / "adapter")
    # Ours rounds activations to bfloat16, so it is off by less than adapters of two steps change it.
    assert np.linalg.norm(ours - theirs) < 0.5 * np.linalg.norm(plain - theirs)


def test_the_command_takes_adapters_of_every_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one Linear per expert, as PEFT converts these, and as it trains parameters."""
    layers = MoEDecoder.from_pretrained(mode="sft", lora_rank=RANK, lora_alpha=ALPHA).trained_experts()
    rng = np.random.default_rng(0)
    for layer in layers:
        shapes = {name: x.shape for name, x in layer.lora_weights.items()}
        layer.init_lora_weights(**{name: rng.normal(0, 0.05, s).astype(bf16) for name, s in shapes.items()})
    base = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    export_peft(tmp_path / "a", layers, layout="per_expert")
    export_peft(tmp_path / "b", layers)
    loaded_by_peft(base, tmp_path / "a").save_pretrained(tmp_path / "c")
    said = []
    for name in "abc":
        options = ["--adapter", str(tmp_path / name), "--json"]
        assert main(["generate", "--prompt=Alice", "--tokens=8", "--temperature=0", *options]) == 0
        said.append(json.loads(capsys.readouterr().out)["text"])
    assert len(set(said)) == 1
    logits = [next_logits(tmp_path / name) for name in "abc"]
    assert_same_bits(logits[0], logits[1])
    assert_same_bits(logits[0], logits[2])
    text = tmp_path / "text.txt"
    text.write_text("Alice was beginning to get very tired of sitting by her sister on the bank. " * 3)
    options = ["--text", str(text), "--methods=BF16", "--json"]
    assert main(["eval", *options, "--adapter", str(tmp_path / "c")]) == 0


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
    export_peft(tmp_path, [student.wrapper(2, layer_idx=1)], layout="per_expert")
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
