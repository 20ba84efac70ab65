"""Routing weights that scale the inputs of the experts: the bits of a layer that is given the scaled rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from layers import (
    POOLS,
    AnyArray,
    Batch,
    Layer,
    assert_close,
    assert_same_bits,
    bf16,
    draw_batch,
    draw_layer,
    engine_of,
    low_level_moe,
)
from native_layers import METHODS as NATIVE_METHODS
from native_layers import draw_native_layer
from quantized_layers import METHODS as QUANTIZED_METHODS
from quantized_layers import product_of, quantized_layer
from sft_layers import (
    BF16,
    Student,
    assert_same_on_any_threads,
    assert_same_steps,
    assert_step_close,
    draw_student,
    draw_training,
    per_matrix,
    train,
)

from ktmoe_np import KTMoEWrapper, MoEConfig

pytestmark = [pytest.mark.kernels, pytest.mark.asan]

E, I, H, P, T = 5, 45, 70, 3, 23  # noqa: E741

EVERY_METHOD = (*QUANTIZED_METHODS, *((name, None) for name in NATIVE_METHODS), ("BF16", None))
every_method = pytest.mark.parametrize(("method", "group_size"), EVERY_METHOD)


def scaled(layer: Layer) -> Layer:
    return replace(layer, scale_inputs=True)


def draw(rng: np.random.Generator, method: str, num_tokens: int = T) -> tuple[Layer, Batch]:
    """A layer that scales its inputs, and a batch, some of whose slots are skipped."""
    if method in NATIVE_METHODS:
        layer: Layer = draw_native_layer(rng, method, E, I, H, with_biases=True)
    else:
        layer = draw_layer(rng, E, I, H, with_biases=True)
    batch = draw_batch(rng, layer, num_tokens, P)
    batch.ids[rng.random(batch.ids.shape) < 0.2] = -1
    return scaled(layer), batch


def rows_of(batch: Batch) -> Batch:
    """A token for every slot, which has the scaled row and counts with weight 1."""
    x = batch.weights[:, :, None] * batch.x.astype(np.float32)[:, None]
    ones = np.ones((batch.ids.size, 1), np.float32)
    return Batch(x.reshape(-1, batch.x.shape[1]).astype(bf16), batch.ids.reshape(-1, 1), ones)


def added(rows: AnyArray, batch: Batch) -> AnyArray:
    """The rows of every token, in the order of its slots."""
    total = np.zeros(batch.x.shape, np.float32)
    for p in range(batch.ids.shape[1]):
        total += rows.reshape(*batch.ids.shape, -1)[:, p]
    return total


def float32_of(moe: Any, batch: Batch, **options: Any) -> AnyArray:
    out: AnyArray = moe.forward(*batch, out=np.empty(batch.x.shape, np.float32), **options)
    return out


# ---- forward passes ----


@every_method
@pytest.mark.parametrize("num_tokens", [1, T])
def test_a_layer_has_the_bits_of_one_that_is_given_the_rows(
    method: str, group_size: int | None, num_tokens: int
) -> None:
    layer, batch = draw(np.random.default_rng(1), method, num_tokens)
    options = {"method": method, "group_size": group_size}
    got = float32_of(layer.wrapper(P, **options), batch)
    plain = replace(layer, scale_inputs=False).wrapper(1, **options)
    assert_same_bits(got, added(float32_of(plain, rows_of(batch)), batch))
    assert_close(got, quantized_layer(layer, method, group_size), batch, product=product_of(method))


def test_chunks_and_columns_in_several_passes() -> None:
    """A hidden size and a batch whose results are combined block by block."""
    rng = np.random.default_rng(2)
    layer = scaled(draw_layer(rng, 4, 3, 2560))
    batch = draw_batch(rng, layer, 900, 4)
    whole = float32_of(layer.wrapper(4), batch)
    assert_same_bits(float32_of(layer.wrapper(4, chunked_prefill_size=100), batch), whole)
    assert_close(whole[:20], layer, batch.rows(slice(20)))


@pytest.mark.parametrize("method", ["BF16", "AMXINT8"])
def test_the_result_is_added_to_what_is_there(method: str) -> None:
    rng = np.random.default_rng(3)
    layer, batch = draw(rng, method)
    moe, out = layer.wrapper(P, method=method), rng.standard_normal(batch.x.shape, np.float32)
    base = out.copy()
    moe.forward(*batch, out=out, incremental=True)
    model = quantized_layer(layer, method, None)
    assert_close(out, model, batch, product=product_of(method), base=base)


def test_threads_and_sub_pools_change_no_bit() -> None:
    layer, batch = draw(np.random.default_rng(4), "BF16")
    results = []
    for pool in POOLS:
        engine, out = engine_of(*pool), np.empty(batch.x.shape, np.float32)
        engine.run(low_level_moe(engine, layer, P).forward_task(*batch, out))
        results.append(out)
    for pool, result in zip(POOLS, results, strict=True):
        assert_same_bits(result, results[0], f"threads {pool}")


@pytest.mark.parametrize("mode", ["inference", "sft"])
@pytest.mark.parametrize("activation", ["silu", "relu2", "swigluoai", "situ"])
@pytest.mark.parametrize("method", ["BF16", "AMXINT8"])
def test_a_row_that_is_not_finite_makes_its_own_token_nan(method: str, activation: str, mode: str) -> None:
    """Whether x or w is not, or only their product; whatever the others of the token weigh."""
    rng = np.random.default_rng(5)
    layer = scaled(draw_layer(rng, E, I, H, activation))
    batch = draw_batch(rng, layer, 9, 2)
    batch.x[:2, 3], batch.x[2:6, 3] = [np.nan, np.inf], 0
    batch.weights[0] = 0.0  # 0 x nan
    batch.weights[2, 1] = np.nan
    batch.weights[3, 0] = np.inf
    batch.x[4, 3], batch.weights[4, 0] = 3e38, 2.0  # beyond float32
    batch.x[5, 3], batch.weights[5, 1] = 3.38e38, 1.006  # beyond bfloat16 alone
    batch.x[6, 3] = np.nan
    batch.ids[6] = -1  # nothing is computed of it
    batch.weights[7, 0], batch.ids[7, 0] = np.nan, -1
    if mode == "sft":
        moe = layer.wrapper(2, mode="sft", method=f"{method.replace('BF16', 'AMXBF16')}_SFT")
        got = moe.forward_sft(*batch, out=np.empty(batch.x.shape, np.float32))
    else:
        got = float32_of(layer.wrapper(2, method=method), batch)
    is_nan = np.isnan(got)
    assert is_nan[:6].all()
    assert not is_nan[6:].any()
    if mode == "inference":
        assert_close(got, quantized_layer(layer, method, None), batch, product=product_of(method))


def test_a_weight_of_zero_does_not_skip_the_slot() -> None:
    """The expert of nothing is its biases."""
    layer, batch = draw(np.random.default_rng(6), "BF16")
    batch.weights[...] = 0
    got = float32_of(layer.wrapper(P), batch)
    assert np.abs(got[(batch.ids >= 0).any(axis=1)]).max(axis=1).min() > 0
    assert_close(got, layer, batch)


# ---- training ----

VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "recompute": {"recompute": True},
    "a float32 cache": {"cache_dtype": np.float32},
    "all gradients": {"full_weight_grad": True},
}


def trained(seed: int, activation: str = "silu", method: Any = BF16) -> tuple[Student, Batch, AnyArray]:
    rng = np.random.default_rng(seed)
    student = draw_student(rng, (E, I, H), 3, activation, method=method, with_biases=True)
    student = replace(student, layer=scaled(student.layer))
    return student, *draw_training(rng, student, T, P)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_a_step(variant: str, activation: str) -> None:
    student, batch, grad_output = trained(1, activation)
    step = train(student.wrapper(P, **VARIANTS[variant]), batch, grad_output)
    assert_step_close(
        step, student, batch, grad_output, float32_cache=VARIANTS[variant].get("cache_dtype") == np.float32
    )


@pytest.mark.parametrize(("method", "group_size"), EVERY_METHOD)
def test_a_step_of_other_methods(method: str, group_size: int | None) -> None:
    name = f"{method.replace('BF16', 'AMXBF16')}_SFT"
    student, batch, grad_output = trained(2, method=(name, group_size))
    assert_step_close(train(student.wrapper(P), batch, grad_output), student, batch, grad_output)


@pytest.mark.parametrize("variant", ["as it is", "recompute", "all gradients"])
def test_gradients_of_matrices_are_those_of_the_rows(variant: str) -> None:
    student, batch, grad_output = trained(3)
    plain = replace(student, layer=replace(student.layer, scale_inputs=False))
    options = VARIANTS[variant]
    step = train(student.wrapper(P, **options), batch, grad_output)
    expected = train(plain.wrapper(1, **options), rows_of(batch), np.repeat(grad_output, P, axis=0))
    assert_same_bits(step.out, added(expected.out, batch))
    for name, value in per_matrix(expected).items():
        assert_same_bits(step.gradients[name], value, name)


def test_what_is_repeated_is_what_was_kept() -> None:
    student, batch, grad_output = trained(4)
    kept, repeated = (
        train(student.wrapper(P, lora_dropout=0.3, recompute=recompute), batch, grad_output)
        for recompute in (False, True)
    )
    assert_same_steps(repeated, kept)


def test_the_routing_of_a_saved_pass_is_its_own() -> None:
    """Two passes wait; the arrays of the first change before its backward pass."""
    student, batch, grad_output = trained(5)
    expected = train(student.wrapper(P), batch, grad_output)
    moe, first = student.wrapper(P, max_cache_depth=2), batch.rows(slice(None))
    moe.forward_sft(*first)
    for array in first:
        array[...] = 0
    moe.forward_sft(*first)
    moe.backward(grad_output)
    again = moe.backward(grad_output)
    assert_same_bits(again.grad_weights, expected.gradients["grad_weights"])
    assert_same_bits(again.grad_input, expected.gradients["grad_input"])


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"lora_dropout": 0.3}], ids=str)
def test_a_step_has_the_same_bits_on_any_threads(options: dict[str, Any]) -> None:
    engines = [engine_of(*pool) for pool in POOLS]
    student, batch, grad_output = trained(6)
    assert_same_on_any_threads(engines, student, batch, grad_output, **options)


def test_a_token_has_the_same_gradients_alone_and_in_a_batch() -> None:
    """In a batch that is large enough for several passes over its columns."""
    rng = np.random.default_rng(7)
    student = draw_student(rng, (4, 5, 1100), 3)
    student = replace(student, layer=scaled(student.layer))
    batch, grad_output = draw_training(rng, student, 4200, 2)
    moe = student.wrapper(2)
    whole = train(moe, batch, grad_output).gradients
    for t in (0, 17, 4199):
        alone = train(moe, batch.rows([t]), grad_output[[t]]).gradients
        for name in ("grad_input", "grad_weights"):
            assert_same_bits(alone[name], whole[name][[t]], f"{name} of token {t}")


# ---- what is refused ----


def test_scale_inputs_is_a_bool() -> None:
    with pytest.raises(TypeError, match="scale_inputs: got 1, expected a bool"):
        KTMoEWrapper(0, E, P, H, I, scale_inputs=1)
    with pytest.raises(TypeError, match="scale_inputs: got 'yes', expected a bool"):
        MoEConfig(E, P, H, I, scale_inputs="yes")  # type: ignore[arg-type]


def test_the_layer_says_what_it_does() -> None:
    assert KTMoEWrapper(0, E, P, H, I, scale_inputs=True).config.scale_inputs
    assert not KTMoEWrapper(0, E, P, H, I).config.scale_inputs
