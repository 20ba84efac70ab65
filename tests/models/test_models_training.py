"""Training of whole models: derivatives by finite differences, laws of a step, what is wrong with input."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ktmoe_np.io import load_hf_config
from ktmoe_np.models import (
    EMBEDDED_MODEL,
    EMBEDDED_TEXT,
    DecoderConfig,
    MoEDecoder,
    bits_per_token,
    loss_and_gradients,
)
from ktmoe_np.models import _arithmetic as arithmetic
from ktmoe_np.models.attention import Attention, Place
from ktmoe_np.models.router import Router

Array = np.ndarray[Any, Any]

TEXTS = [list(EMBEDDED_TEXT.read_bytes()[at : at + 48]) for at in (1000, 5000, 9000)]


def differentiated(f: Callable[[Array], Array], x: Array, grad: Array, step: float = 1e-6) -> Array:
    """The gradient by x of the sum of f(x) grad, by central differences."""
    result = np.empty_like(x)
    for at in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        result[at] = ((f(moved[0]) - f(moved[1])) * grad).sum() / (2 * step)
    return result


def assert_is_derivative(f: Callable[[Array], Array], x: Array, grad: Array, found: Array) -> None:
    expected = differentiated(f, x, grad)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3


def test_softmax() -> None:
    rng = np.random.default_rng(0)
    x, grad = rng.normal(size=(2, 5)), rng.normal(size=(2, 5))
    found = arithmetic.softmax_backward(arithmetic.softmax(x), grad)
    assert_is_derivative(arithmetic.softmax, x, grad, found)


def test_norm() -> None:
    rng = np.random.default_rng(1)
    x, weight, grad = rng.normal(size=(3, 6)), rng.normal(size=6), rng.normal(size=(3, 6))
    found = arithmetic.rms_norm_backward(x, weight, 0.1, grad)
    assert_is_derivative(lambda x: arithmetic.rms_norm(x, weight, 0.1), x, grad, found)


@pytest.mark.parametrize("renormalize", [False, True])
def test_router(renormalize: bool) -> None:
    rng = np.random.default_rng(2)
    router = Router(rng.normal(size=(6, 5)), 2, renormalize)
    x, grad = rng.normal(size=(4, 6)), rng.normal(size=(4, 2))
    found = router.backward(router.forward(x), grad)
    assert_is_derivative(lambda x: router.forward(x).weights, x, grad, found)


@pytest.mark.parametrize("qk_norm", ["", "head", "all"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_attention(qk_norm: str, clip: float | None) -> None:
    rng = np.random.default_rng(3)
    config = replace(
        DecoderConfig.from_hf_config(load_hf_config(EMBEDDED_MODEL)),
        hidden_size=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        qk_norm=qk_norm,
        clip_qkv=clip,
    )
    widths = {"": None, "head": (4, 4), "all": (16, 8)}[qk_norm]
    attention = Attention(
        config,
        *(rng.normal(size=(6, width)) for width in (16, 8, 8)),
        rng.normal(size=(16, 6)),
        widths and (rng.normal(size=widths[0]), rng.normal(size=widths[1])),
    )
    angles = rng.normal(size=(5, 2))
    place = Place(np.cos(angles), np.sin(angles))

    def attend(x: Array) -> Any:
        return attention.forward(x, place, lambda keys, values: (keys, values))

    x, grad = rng.normal(size=(5, 6)), rng.normal(size=(5, 6))
    _, kept = attend(x)
    if clip is not None:
        assert any((np.abs(part) > clip).any() and (np.abs(part) < clip).any() for part in kept.projected)
    assert_is_derivative(lambda x: attend(x)[0], x, grad, attention.backward(kept, grad))


def trained(**options: Any) -> MoEDecoder:
    """The embedded model with adapters that do something."""
    model = MoEDecoder.from_pretrained(mode="sft", lora_rank=4, lora_alpha=4.0, **options)
    rng = np.random.default_rng(4)
    for experts in model.trained_experts():
        experts.init_lora_weights(
            **{
                name: rng.normal(0, 0.5 * x.shape[-1] ** -0.5, x.shape).astype(np.float32)
                for name, x in experts.lora_weights.items()
            }
        )
    return model


@pytest.fixture(scope="module")
def model() -> MoEDecoder:
    return trained()


def moved(model: MoEDecoder, values: list[dict[str, Array]]) -> None:
    for experts, matrices in zip(model.trained_experts(), values, strict=True):
        experts.update_lora_weights(**matrices)


# Slow: fourteen losses of a whole model, two for each of the six adapters and two for all.
@pytest.mark.slow
def test_a_step_along_the_gradient_changes_the_loss_as_it_says() -> None:
    model = trained()
    before = [dict(experts.lora_weights) for experts in model.trained_experts()]
    gradients = [layer.matrices for layer in loss_and_gradients(model, TEXTS).layers]
    for only in (None, *gradients[0]):
        directions = [{name: x for name, x in layer.items() if only in (None, name)} for layer in gradients]
        size = sum(float(np.square(x).sum()) for layer in directions for x in layer.values())
        losses = []
        for sign in (1, -1):
            step = np.float32(sign * 0.02 / size)  # changes the loss by about 0.02
            pairs = zip(before, directions, strict=True)
            moved(model, [{n: old[n] + step * x for n, x in layer.items()} for old, layer in pairs])
            losses.append(loss_and_gradients(model, TEXTS).bits_per_token * np.log(2))
            moved(model, before)
        assert losses[0] - losses[1] == pytest.approx(0.04, rel=0.15)


def test_a_batch_is_the_mean_of_its_sequences(model: MoEDecoder) -> None:
    texts = [TEXTS[0], TEXTS[1][:20], TEXTS[2][:33]]
    together = loss_and_gradients(model, texts)
    apart = [loss_and_gradients(model, [text]) for text in texts]
    shares = [len(text) - 1 for text in texts]
    assert together.num_tokens == sum(shares)
    assert together.bits_per_token == pytest.approx(
        np.average([x.bits_per_token for x in apart], weights=shares)
    )
    moves = moves_of_gradients(model, texts)
    for i, layer in enumerate(together.layers):
        for name, matrix in layer.matrices.items():
            mean = np.average([x.layers[i].matrices[name] for x in apart], axis=0, weights=shares)
            # Twice, and twice as the shares of the loss are rounded to bfloat16 otherwise too.
            assert np.linalg.norm(matrix - mean) <= 4 * moves[i][name]


def moves_of_gradients(model: MoEDecoder, texts: list[list[int]]) -> list[dict[str, float]]:
    """How far gradients move when the last bits of the embedding change, so that roundings fall otherwise."""
    plain, rng = loss_and_gradients(model, texts), np.random.default_rng(0)
    moves = [dict.fromkeys(layer.matrices, 0.0) for layer in plain.layers]
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            noise = rng.choice(np.float32([1 - 2.0**-23, 1 + 2.0**-23]), model._embedding.shape)
            patch.setattr(model, "_embedding", model._embedding * noise)
            moved = loss_and_gradients(model, texts)
        for found, before, after in zip(moves, plain.layers, moved.layers, strict=True):
            for name, matrix in before.matrices.items():
                found[name] = max(found[name], float(np.linalg.norm(after.matrices[name] - matrix)))
    return moves


def test_a_step_has_the_bits_of_its_repetition(model: MoEDecoder) -> None:
    first, second = (loss_and_gradients(model, TEXTS) for _ in range(2))
    assert first.bits_per_token == second.bits_per_token
    for layer, other in zip(first.layers, second.layers, strict=True):
        for name, matrix in layer.matrices.items():
            assert matrix.tobytes() == other.matrices[name].tobytes()


def test_the_loss_is_that_of_a_measurement() -> None:
    model = MoEDecoder.from_pretrained(mode="sft")  # its adapters are zero
    measured = bits_per_token(MoEDecoder.from_pretrained(), TEXTS[0])
    assert loss_and_gradients(model, [TEXTS[0]]).bits_per_token == pytest.approx(measured, rel=1e-5)
    assert bits_per_token(model, TEXTS[0]) == pytest.approx(measured, rel=1e-5)


def test_passes_wait_for_their_way_back() -> None:
    model = trained(max_cache_depth=2)
    passes = [model.forward_sft([text[:-1]]) for text in TEXTS[:2]]
    found = []
    for logits, kept in passes[::-1]:
        found.append(model.backward(kept, [np.ones_like(x) for x in logits]))
    for text, layers in zip(TEXTS[:2], found[::-1], strict=True):
        (logits,), kept = model.forward_sft([text[:-1]])
        again = model.backward(kept, [np.ones_like(logits)])
        assert layers[0].gate_lora_a.tobytes() == again[0].gate_lora_a.tobytes()


@pytest.mark.parametrize("method", ["BF16", "AMXINT4", "AMXINT8_SFT"])
def test_methods_are_named_with_or_without_their_ending(method: str) -> None:
    model = MoEDecoder.from_pretrained(method=method, mode="sft", lora_rank=1)
    assert model.experts[0].method == f"{method.removesuffix('_SFT')}_SFT"


def test_examples() -> None:
    found = doctest.testmod(importlib.import_module("ktmoe_np.models.training"))
    assert found.attempted > 0
    assert found.failed == 0


def test_models_for_inference_are_refused() -> None:
    model = MoEDecoder.from_pretrained()
    with pytest.raises(ValueError, match="model: got one whose experts have no adapters, expected one"):
        loss_and_gradients(model, TEXTS)


@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [
        ([], ValueError, r"sequences: got shapes \[\], expected one or more of \[T\], at least 2"),
        ([[1]], ValueError, r"sequences: got shapes \[\[1\]\]"),
        ([[[1, 2]]], ValueError, r"sequences: got shapes \[\[1, 2\]\]"),
        ([[1, 256]], IndexError, "tokens: got 256, expected 0 to 255"),
        ([[1, -1]], IndexError, "tokens: got -1, expected 0 to 255"),
        ([[256, 1]], IndexError, "tokens: got 256, expected 0 to 255"),
        ([[0.5, 1]], ValueError, r"tokens: got float64 \[2\], expected integers"),
    ],
)
def test_wrong_sequences(model: MoEDecoder, sequences: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        loss_and_gradients(model, sequences)
    assert all(experts.num_cached == 0 for experts in model.trained_experts())


def test_wrong_gradients_of_logits(model: MoEDecoder) -> None:
    (logits,), kept = model.forward_sft([TEXTS[0]])
    with pytest.raises(ValueError, match=r"grad_logits: got \[\(48, 255\)\], expected \[\(48, 256\)\]"):
        model.backward(kept, [logits[:, :-1]])
    model.clear_cache()


def test_passes_are_gone_back_from_the_last() -> None:
    model = trained(max_cache_depth=2)
    (first, kept_first), (second, kept_second) = (model.forward_sft([text[:-1]]) for text in TEXTS[:2])
    with pytest.raises(
        RuntimeError, match=r"forward_sft: 2 passes wait .*, expected fewer than max_cache_depth, 2"
    ):
        model.forward_sft([TEXTS[2]])
    with pytest.raises(RuntimeError, match="kept: got pass 1, expected 2, the last that waits"):
        model.backward(kept_first, first)
    model.backward(kept_second, [x.tolist() for x in second])
    model.backward(kept_first, first)
    with pytest.raises(RuntimeError, match="kept: got pass 1, expected none: none waits"):
        model.backward(kept_first, first)


def test_wrong_tokens_leave_other_passes_alone() -> None:
    model = trained(max_cache_depth=2)
    logits, kept = model.forward_sft([TEXTS[0]])
    with pytest.raises(IndexError, match="tokens: got 256"):
        loss_and_gradients(model, [[1, 256]])
    with pytest.raises(ValueError, match="tokens: got no sequences, expected one or more"):
        model.forward_sft([])
    model.backward(kept, logits)


def test_a_pass_that_breaks_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    with monkeypatch.context() as patch:
        patch.setattr(model._layers[2], "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.forward_sft(TEXTS)
    assert all(experts.num_cached == 0 for experts in model.trained_experts())
    loss_and_gradients(model, TEXTS)


def test_an_interrupt_leaves_no_pass_behind(model: MoEDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MoEDecoder, "backward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            loss_and_gradients(model, TEXTS)
    assert all(experts.num_cached == 0 for experts in model.trained_experts())
    loss_and_gradients(model, TEXTS)
