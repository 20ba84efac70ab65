"""The training step of the reference against a plain loop, against inference, and its laws."""

from __future__ import annotations

import doctest
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cases import FORMULAS, AnyArray, Layer, bf16, bits
from training_cases import LORA_NAMES, draw_training, present, train
from training_loop import Loop

import ktmoe_np.reference.backward
import ktmoe_np.reference.lora
import ktmoe_np.reference.training
from ktmoe_np.config import activation_names
from ktmoe_np.reference import Dropout, LoraWeights, moe_backward, moe_forward, moe_forward_sft, round_bf16

quick = settings(deadline=None, max_examples=50)


def test_doctests() -> None:
    for module in (ktmoe_np.reference.lora, ktmoe_np.reference.training, ktmoe_np.reference.backward):
        assert doctest.testmod(module).failed == 0


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["silu", "relu2"]),
    st.tuples(*(st.integers(low, high) for low, high in ((0, 4), (1, 3), (0, 3), (1, 9), (1, 7), (1, 4)))),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.booleans(),
    st.sets(st.sampled_from(["biases", "mask", "float32 lora", "scaled"])),
)
@quick
def test_a_step_is_the_loop(
    seed: int, activation: str, sizes: tuple[int, ...], rate: float, float32_cache: bool, options: set[str]
) -> None:
    names = dict(zip(("T", "E", "P", "H", "inter", "R"), sizes, strict=True))
    layer, grad_output = draw_training(seed, **names, activation=activation, biases="biases" in options)
    if "mask" in options:
        layer["gpu_experts_mask"] = np.random.default_rng(seed).random(names["E"]) < 0.4
    layer["scale_inputs"] = "scaled" in options
    if "float32 lora" in options:
        layer["lora"] = unrounded(layer["lora"], seed)
    layer["dropout"] = Dropout(rate, seed=seed, step=seed // 2, layer=seed % 9) if rate else None
    loop = Loop(layer, grad_output, float32_cache=float32_cache)
    numbers: Layer = {"accumulate_dtype": np.float64, "cache_dtype": np.float32 if float32_cache else bf16}
    out, cache = moe_forward_sft(**layer, **numbers, out_dtype=np.float64)
    np.testing.assert_allclose(out, loop.out, rtol=1e-13, atol=1e-13)
    gradients = present(moe_backward(cache, grad_output, full_weight_grad=True))
    grad_input = gradients.pop("grad_input")
    assert grad_input.dtype == bf16
    np.testing.assert_array_equal(grad_input.astype("f4"), round_bf16(loop.gradients.pop("grad_input")))
    assert gradients.keys() == loop.gradients.keys()
    for name, expected in loop.gradients.items():
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-13, atol=1e-13, err_msg=name)


def unrounded(lora: LoraWeights, seed: int) -> LoraWeights:
    """Matrices in float32 whose values bfloat16 does not hold."""
    rng = np.random.default_rng(seed)
    matrices = {name: getattr(lora, name) for name in LORA_NAMES}
    drawn = {
        name: rng.standard_normal(value.shape, np.float32)
        for name, value in matrices.items()
        if value is not None
    }
    return replace(lora, **drawn)


def without_b(lora: LoraWeights) -> LoraWeights:
    matrices = {name: getattr(lora, name) for name in LORA_NAMES if name.endswith("_b")}
    return replace(lora, **{k: np.zeros_like(v) for k, v in matrices.items() if v is not None})


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(sorted(FORMULAS)),
    st.integers(0, 6),
    st.sampled_from(["no lora", "rank 0", "B = 0"]),
    st.sampled_from([None, Dropout(0.5)]),
    st.sampled_from([np.float32, np.float64]),
    st.sets(st.sampled_from(["biases", "mask", "map", "scaled"])),
)
@quick
def test_without_adapters_it_is_inference_bit_for_bit(
    seed: int, name: str, T: int, kind: str, dropout: Dropout | None, accumulate: type, options: set[str]
) -> None:
    rank = 0 if kind == "rank 0" else 3
    layer, grad_output = draw_training(
        seed, T=T, R=rank, activation=FORMULAS[name][0], biases="biases" in options
    )
    layer["scale_inputs"] = "scaled" in options
    if "mask" in options:
        layer["gpu_experts_mask"] = np.random.default_rng(seed).random(4) < 0.4
    if "map" in options:
        layer["physical_to_logical_map"] = np.random.default_rng(seed).integers(0, 4, 4)
    lora = layer.pop("lora")
    adapters = {"no lora": None, "rank 0": lora, "B = 0": without_b(lora)}[kind]
    for out_dtype in (bf16, np.float32):
        numbers: Layer = {"accumulate_dtype": accumulate, "out_dtype": out_dtype}
        expected = moe_forward(**layer, **numbers)
        out, cache = moe_forward_sft(**layer, **numbers, lora=adapters, dropout=dropout)
        assert out.dtype == out_dtype
        assert out.tobytes() == expected.tobytes()
    got, base = (
        moe_backward(cache, grad_output, full_weight_grad=True),
        train(layer, grad_output, accumulate_dtype=accumulate),
    )
    for each in ("grad_input", "grad_weights", "gate_proj", "up_proj", "down_proj"):
        np.testing.assert_array_equal(getattr(got, each), getattr(base, each))
    if kind == "rank 0":
        assert got.gate_lora_a is not None
        assert got.gate_lora_a.shape == (4, 0, 48)
    assert base.gate_lora_a is None


@pytest.mark.parametrize("activation", activation_names())
def test_what_there_is(activation: str) -> None:
    layer, grad_output = draw_training(0, activation=activation)
    gated = layer["up_proj"] is not None
    out, cache = moe_forward_sft(**layer)
    assert (out.dtype, out.shape) == (bf16, (5, 48))
    assert (cache.gate.dtype, cache.h.dtype, cache.gate.shape) == (bf16, bf16, (5, 2, 40))
    assert (cache.up is not None) == gated
    shapes = {"grad_input": (5, 48), "grad_weights": (5, 2)}
    assert {
        k: v.shape for k, v in present(moe_backward(cache, grad_output, skip_lora=True)).items()
    } == shapes
    shapes |= {k: getattr(layer["lora"], k).shape for k in LORA_NAMES if gated or not k.startswith("up")}
    gradients = present(moe_backward(cache, grad_output))
    assert {name: value.shape for name, value in gradients.items()} == shapes
    assert gradients.pop("grad_input").dtype == bf16
    assert {value.dtype for value in gradients.values()} == {np.dtype(np.float32)}
    full = {k: layer[k].shape for k in ("gate_proj", "up_proj", "down_proj") if layer[k] is not None}
    gradients = present(moe_backward(cache, grad_output, full_weight_grad=True))
    assert {name: value.shape for name, value in gradients.items()} == shapes | full


def test_options_leave_the_other_gradients_alone() -> None:
    layer, grad_output = draw_training(0)
    _, cache = moe_forward_sft(**layer)
    every = present(moe_backward(cache, grad_output, full_weight_grad=True))
    for options in ({}, {"skip_lora": True}):
        for name, value in present(moe_backward(cache, grad_output, **options)).items():
            assert value.tobytes() == every[name].tobytes()


def test_the_cache_keeps_what_was_computed() -> None:
    layer, _ = draw_training(0)
    rounded, full, exact = (
        moe_forward_sft(**layer, **numbers)[1]
        for numbers in ({}, {"cache_dtype": np.float32}, {"exact": True, "accumulate_dtype": np.float32})
    )
    assert [c.gate.dtype for c in (rounded, full, exact)] == [bf16, np.float32, np.float64]
    assert np.array_equal(bits(rounded.gate), bits(full.gate.astype(bf16)))
    assert np.array_equal(bits(rounded.h), bits(full.h))
    assert (full.gate != round_bf16(full.gate)).any()
    skipped = layer["topk_ids"] < 0
    assert not rounded.gate[skipped].any()
    assert not rounded.h[skipped].any()
    assert (exact.h != round_bf16(exact.h)).any()


def test_the_backward_pass_does_not_see_later_changes() -> None:
    layer, grad_output = draw_training(0)
    layer["lora"] = unrounded(layer["lora"], 0)
    _, cache = moe_forward_sft(**layer)
    before = present(moe_backward(cache, grad_output))
    layer["hidden_states"][:] = 0
    for name in LORA_NAMES:
        getattr(layer["lora"], name)[:] = 0
    for name, value in present(moe_backward(cache, grad_output)).items():
        assert value.tobytes() == before[name].tobytes()


def test_dropout_repeats_with_its_key_and_changes_with_it() -> None:
    layer, grad_output = draw_training(0)
    plain = moe_forward_sft(**layer)[0]
    assert np.array_equal(bits(moe_forward_sft(**layer, dropout=Dropout(0.0, seed=9))[0]), bits(plain))
    step = Dropout(0.5, seed=9, step=1)
    out, cache = moe_forward_sft(**layer, dropout=step)
    again, cache_again = moe_forward_sft(**layer, dropout=step)
    assert np.array_equal(bits(out), bits(again))
    for name, value in present(moe_backward(cache, grad_output)).items():
        assert value.tobytes() == getattr(moe_backward(cache_again, grad_output), name).tobytes()
    for other in (replace(step, step=2), replace(step, seed=8), replace(step, layer=1), None):
        assert not np.array_equal(bits(moe_forward_sft(**layer, dropout=other)[0]), bits(out))


def nan_layer(activation: str) -> tuple[Layer, AnyArray]:
    layer, grad_output = draw_training(3, T=4, activation=activation)
    layer["topk_ids"] = np.array([[0, 1], [2, -1], [-1, -1], [2, 2]])
    return layer, grad_output


@pytest.mark.parametrize("activation", activation_names())
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("zero", [False, True])
def test_what_is_not_finite_makes_its_row_and_its_experts_nan(
    activation: str, value: float, zero: bool
) -> None:
    for t, experts in ((0, [0, 1]), (1, [2]), (2, [])):
        layer, grad_output = nan_layer(activation)
        if zero:
            layer["gate_proj"] = np.zeros_like(layer["gate_proj"])
            grad_output[t] = 0
        clean_out, clean = moe_forward_sft(**layer)[0], present(train(layer, grad_output))
        layer["hidden_states"][t, 7] = value
        with np.errstate(all="raise"):
            out, cache = moe_forward_sft(**layer)
            got = present(moe_backward(cache, grad_output, full_weight_grad=True))
        others, computed = np.arange(4) != t, layer["topk_ids"][t] >= 0
        assert np.array_equal(bits(out[others]), bits(clean_out[others]))
        for name in ("grad_input", "grad_weights"):
            assert got[name][others].tobytes() == clean[name][others].tobytes()
        assert np.isnan(got["grad_input"][t].astype("f4")).all() == bool(experts)
        assert np.isnan(got["grad_input"][t].astype("f4")).any() == bool(experts)
        assert np.array_equal(np.isnan(got["grad_weights"][t]), computed)
        for name in got.keys() - {"grad_input", "grad_weights"}:
            assert np.isnan(got[name][experts]).all(), name
            rest = [e for e in range(4) if e not in experts]
            assert got[name][rest].tobytes() == clean[name][rest].tobytes(), name


def test_a_gradient_that_is_not_finite_stays_in_its_row_and_its_experts() -> None:
    layer, grad_output = nan_layer("silu")
    clean = present(train(layer, grad_output))
    grad_output[1, 5] = np.inf
    with np.errstate(all="raise"):
        got = present(train(layer, grad_output))
    others = np.arange(4) != 1
    for name in ("grad_input", "grad_weights"):
        assert got[name][others].tobytes() == clean[name][others].tobytes()
        assert not np.isfinite(got[name][1, 0].astype("f4"))
    for name in got.keys() - {"grad_input", "grad_weights"}:
        rest = [0, 1, 3]
        assert got[name][rest].tobytes() == clean[name][rest].tobytes(), name
