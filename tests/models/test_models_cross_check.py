"""Whole models against transformers: layer by layer, their logits, their gradients, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmoe_np.models import (
    EMBEDDED_MODEL,
    EMBEDDED_TEXT,
    MoEDecoder,
    generate,
    load_tokenizer,
    loss_and_gradients,
)
from ktmoe_np.models import attention as attention_module
from ktmoe_np.models.attention import Place

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from decoder_truth import (  # noqa: E402  (needs both)
    FACTOR,
    AdaptedExperts,
    Peers,
    assert_as_exact,
    clear_tokens,
    in_float64,
)

pytestmark = [pytest.mark.crosscheck, pytest.mark.filterwarnings("ignore")]

AnyArray = Any

NUM_TOKENS = 24

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


def random_model(family: str, path: Path) -> None:
    """Write a small model of a family, its numbers larger than at first, so that all parts count."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.5 if weight.ndim == 1 else weight.shape[-1] ** -0.5))
    model.to(torch.bfloat16).save_pretrained(path)


@dataclass
class Case:
    """A checkpoint, what transformers makes of it, and tokens that no rounding sends to other experts."""

    path: Path
    peers: Peers
    tokens: AnyArray


def candidates(family: str) -> Iterator[AnyArray]:
    text = np.frombuffer(EMBEDDED_TEXT.read_bytes(), np.uint8).astype(np.int64)
    for seed in range(500):
        if family == "embedded":
            yield text[seed * NUM_TOKENS : (seed + 1) * NUM_TOKENS]
        else:
            yield np.random.default_rng(seed).integers(0, COMMON["vocab_size"], NUM_TOKENS)


@pytest.fixture(scope="module", params=[*FAMILIES, "embedded"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = EMBEDDED_MODEL
    if request.param != "embedded":
        path = tmp_path_factory.mktemp(request.param)
        random_model(request.param, path)
    peers = Peers(path)
    return Case(path, peers, clear_tokens(peers, candidates(request.param)))


# ---- layer by layer, on the truth's own input ----


@dataclass
class Stages:
    """What a layer gives on its way."""

    middle: AnyArray
    ids: AnyArray
    weights: AnyArray
    out: AnyArray


def by_expert(ids: AnyArray, weights: AnyArray) -> tuple[AnyArray, AnyArray]:
    """The slots of each token in the order of their experts."""
    order = np.argsort(ids, axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)


def their_stages(model: Any, i: int, x: AnyArray, mask: Any) -> Stages:
    layer, seen = model.model.layers[i], {}
    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        layer.mlp.gate.register_forward_hook(lambda _, args, output: seen.update(route=output)),
    ]
    dtype, positions = model.lm_head.weight.dtype, torch.arange(len(x))[None]
    try:
        with torch.no_grad(), in_float64() if dtype is torch.float64 else nullcontext():
            hidden = torch.tensor(x, dtype=dtype)[None]
            angles = model.model.rotary_emb(hidden, position_ids=positions)
            out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=angles)
    finally:
        for hook in hooks:
            hook.remove()
    ids, weights = by_expert(seen["route"][2].numpy(), seen["route"][1].numpy())
    return Stages(seen["x"][0].numpy(), ids, weights, out[0].numpy())


def our_stages(ours: MoEDecoder, i: int, x: AnyArray) -> Stages:
    layer, tape = ours._layers[i], []  # type: ignore[var-annotated]
    (out,) = layer.forward([x], [ours._place(0, len(x))], [ours.new_cache()], tape)
    ours.clear_cache()
    (route,) = tape[0].routes
    return Stages(tape[0].middles[0], *by_expert(route.ids, route.weights), out)


def inputs_of_layers(peers: Peers, tokens: AnyArray) -> list[tuple[AnyArray, Any]]:
    """What goes into each layer of the truth, and last into its norm, in float32; with the mask."""
    seen: list[tuple[AnyArray, Any]] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0][0].numpy().astype(np.float32), kwargs.get("attention_mask")))

    modules = [*peers.truth.model.layers, peers.truth.model.norm]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    peers.logits(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def check_layers(ours: MoEDecoder, case: Case) -> None:
    """Every part of every layer is as exact as that of transformers in the same dtypes."""
    peers = case.peers
    *layers, (last, _) = inputs_of_layers(peers, case.tokens)
    np.testing.assert_array_equal(ours._embedding[case.tokens], layers[0][0])
    for i, (x, mask) in enumerate(layers):
        got = our_stages(ours, i, x)
        truth, single, yardstick = (
            their_stages(model, i, x, mask) for model in (peers.truth, peers.single, peers.yardstick)
        )
        assert_as_exact(got.middle, single.middle, truth.middle, f"layer {i}, attention")
        np.testing.assert_array_equal(got.ids, truth.ids)
        assert_as_exact(got.weights, single.weights, truth.weights, f"layer {i}, routing weights")
        assert_as_exact(got.out, yardstick.out, truth.out, f"layer {i}, experts")
    with torch.no_grad():
        single = peers.single.lm_head(peers.single.model.norm(torch.tensor(last))).numpy()
        with in_float64():
            truth = peers.truth.lm_head(peers.truth.model.norm(torch.tensor(last).double())).numpy()
    assert_as_exact(ours._normed(last) @ ours._head, single, truth, "logits")


def loaded(path: Path) -> MoEDecoder:
    """For training, so that it shows what it does on its way; its adapters are zero."""
    return MoEDecoder.from_pretrained(path, mode="sft", lora_rank=1)


def test_every_layer(case: Case) -> None:
    check_layers(loaded(case.path), case)


def turned(change: Callable[[Place], Place]) -> Callable[[MoEDecoder, pytest.MonkeyPatch], None]:
    """A mistake in what attention knows of positions."""

    def mistake(ours: MoEDecoder, patch: pytest.MonkeyPatch) -> None:
        place = MoEDecoder._place
        patch.setattr(MoEDecoder, "_place", lambda self, *args: change(place(self, *args)))

    return mistake


def scaled_scores(ours: MoEDecoder, patch: pytest.MonkeyPatch) -> None:
    softmax = attention_module.softmax
    patch.setattr(attention_module, "softmax", lambda x: softmax(x * np.float32(1.001)))


def larger_epsilon(ours: MoEDecoder, patch: pytest.MonkeyPatch) -> None:
    for layer in ours._layers:
        layer.eps *= 10


def larger_last_epsilon(ours: MoEDecoder, patch: pytest.MonkeyPatch) -> None:
    ours.config = replace(ours.config, rms_norm_eps=100 * ours.config.rms_norm_eps)


def other_normalization(ours: MoEDecoder, patch: pytest.MonkeyPatch) -> None:
    for layer in ours._layers:
        layer.router = replace(layer.router, renormalize=not layer.router.renormalize)


def one_expert_in_place_of_another(ours: MoEDecoder, patch: pytest.MonkeyPatch) -> None:
    experts = ours.trained_experts()[-1]
    forward = experts.forward_sft
    patch.setattr(
        experts, "forward_sft", lambda rows, ids, *rest, **out: forward(rows, ids ^ 1, *rest, **out)
    )


#: Small mistakes, each of which a tolerance would let pass.
MISTAKES: dict[str, Callable[[MoEDecoder, pytest.MonkeyPatch], None]] = {
    "sine": turned(lambda place: replace(place, sin=place.sin * np.float32(1.001))),
    "cosine": turned(lambda place: replace(place, cos=place.cos * np.float32(1.001))),
    "scale of scores": scaled_scores,
    "epsilon": larger_epsilon,
    "last epsilon": larger_last_epsilon,
    "normalization of routing weights": other_normalization,
    "experts": one_expert_in_place_of_another,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(case: Case, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = loaded(case.path)
    MISTAKES[mistake](ours, monkeypatch)
    with pytest.raises(AssertionError, match="of the yardstick"):
        check_layers(ours, case)


# ---- whole models ----


def test_logits(case: Case) -> None:
    ours = MoEDecoder.from_pretrained(case.path)
    cache = ours.new_cache()
    parts = [ours.forward([part], [cache])[0] for part in (case.tokens[:17], case.tokens[17:])]
    assert_as_exact(np.concatenate(parts), *case.peers.logits(case.tokens), "logits")


def test_gradients(case: Case) -> None:
    rank, alpha = 4, 8.0
    ours = MoEDecoder.from_pretrained(case.path, mode="sft", lora_rank=rank, lora_alpha=alpha)
    rng, adapters = np.random.default_rng(6), []
    for experts in ours.trained_experts():
        shapes = {name: x.shape for name, x in experts.lora_weights.items()}
        drawn = {n: rng.normal(0, 0.4 * s[-1] ** -0.5, s).astype(np.float32) for n, s in shapes.items()}
        drawn = {n: np.array(torch.tensor(x).bfloat16().float()) for n, x in drawn.items()}
        experts.init_lora_weights(**drawn)
        adapters.append(drawn)

    peers, found = Peers(case.path), []
    for model, dtype in ((peers.single, torch.bfloat16), (peers.truth, torch.float64)):
        parts = []
        for layer, matrices in zip(model.model.layers, adapters, strict=True):
            parts.append(AdaptedExperts(layer.mlp.experts, matrices, alpha / rank, dtype))
            layer.mlp.experts = parts[-1]
        with in_float64() if dtype is torch.float64 else nullcontext():
            logits = model(torch.tensor(case.tokens[None, :-1]), use_cache=False).logits[0]
            nats = torch.nn.functional.cross_entropy(logits, torch.tensor(case.tokens[1:]))
            nats.backward()
        found.append((logits.detach().numpy(), nats.item(), parts))
    (near_logits, _, near), (true_logits, true_nats, true) = found

    loss = loss_and_gradients(ours, [case.tokens])
    # A loss differs by no more than twice what its logits do.
    within = 2 * FACTOR * np.abs(near_logits - true_logits).max()
    assert abs(loss.bits_per_token * np.log(2) - true_nats) <= within
    for i, gradients in enumerate(loss.layers):
        for name, matrix in gradients.matrices.items():
            yardstick, truth = (part[i].leaves[name].grad.numpy() for part in (near, true))
            assert_as_exact(matrix, yardstick, truth, f"layer {i}, {name}")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_embedded_model_says_the_same(prompt: str) -> None:
    """A token is the truth's likeliest wherever the next is not nearly as likely."""
    ours, theirs = load_tokenizer(EMBEDDED_MODEL), transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    ids = ours.encode(prompt)
    assert theirs(prompt).input_ids == ids
    said = list(generate(MoEDecoder.from_pretrained(), ids, 128))
    assert theirs.decode(said) == ours.decode(said)
    near, true = (logits[len(ids) - 1 :] for logits in Peers(EMBEDDED_MODEL).logits([*ids, *said[:-1]]))
    ordered = np.sort(true, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 2 * np.abs(near - true).max()
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(np.array(said)[clear], true.argmax(axis=1)[clear])
