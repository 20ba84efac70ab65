"""Products that take int8 activations in JAX programs: the bits of NumPy, for a layer or for a call."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from int8_layers import draw_int8_layer
from layers import assert_same_bits, draw_batch, draw_layer
from sft_layers import by_name, draw_training

from ktmoe_np import KTMoEWrapper

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax_cases import E, H, I, P, R, as_jax, assert_same_gradients, numpy  # noqa: E402

from ktmoe_np.jax import (  # noqa: E402
    lora_parameters,
    moe_drain_deferred,
    moe_forward,
    moe_forward_deferred,
    moe_sft,
)

pytestmark = pytest.mark.crosscheck

METHODS = [("MOE_INT8", None), ("MXFP4", None), ("LLAMAFILE", None)]
methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method[0])
wraps = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def drawn(method: Any, seed: int = 0) -> tuple[np.random.Generator, Any]:
    rng = np.random.default_rng(seed)
    return rng, draw_int8_layer(rng, method, (E, I, H))


@methods
@wraps
def test_forward_has_the_bits_of_numpy(method: Any, wrap: Any) -> None:
    rng, layer = drawn(method)
    batch = draw_batch(rng, layer.layer, 7, P)
    moe, made = layer.wrapper(P), layer.wrapper(P, activation_dtype="int8")
    in_int8, in_bf16 = made.forward(*batch), moe.forward(*batch)
    assert not np.array_equal(in_int8, in_bf16)
    for called, dtype, expected in (
        (moe, "int8", in_int8),
        (moe, None, in_bf16),
        (made, None, in_int8),
        (made, jnp.bfloat16, in_bf16),
        (made, jnp.int8, in_int8),
    ):
        program = wrap(partial(moe_forward, called, activation_dtype=dtype))
        for _ in range(2):
            assert_same_bits(numpy(program(*as_jax(batch))), expected)


def test_a_program_calls_a_layer_in_both() -> None:
    rng, layer = drawn(METHODS[0])
    batch = draw_batch(rng, layer.layer, 7, P)
    moe = layer.wrapper(P)
    calls = [partial(moe_forward, moe, activation_dtype=dtype) for dtype in ("int8", "bfloat16")]
    both = jax.jit(lambda *arrays: [call(*arrays) for call in calls])(*as_jax(batch))
    for found, dtype in zip(both, ("int8", "bfloat16"), strict=True):
        assert_same_bits(numpy(found), moe.forward(*batch, activation_dtype=dtype))
    moe.set_gpu_experts_mask(np.arange(E) == batch.ids[0, 0])  # another number, with the mask of that time
    masked = moe_forward(moe, *as_jax(batch), activation_dtype="int8")
    assert_same_bits(numpy(masked), moe.forward(*batch, activation_dtype="int8"))


def test_a_scan_over_layers() -> None:
    rng = np.random.default_rng(1)
    moes = [draw_int8_layer(rng, METHODS[0], (E, I, H)).wrapper(P, layer_idx=i) for i in range(3)]
    batch = draw_batch(rng, draw_layer(rng, E, I, H), 7, P)
    x, ids, weights = as_jax(batch)

    @jax.jit
    def run(x: Any) -> Any:
        def step(x: Any, index: Any) -> Any:
            return moe_forward(moes, x, ids, weights, index=index, activation_dtype="int8"), None

        return jax.lax.scan(step, x, jnp.arange(3))[0]

    expected = batch.x
    for moe in moes:
        expected = moe.forward(expected, *batch[1:], activation_dtype="int8")
    assert_same_bits(numpy(run(x)), expected)


@wraps
@pytest.mark.parametrize("dtypes", [("int8", "int8"), ("int8", "bfloat16"), ("bfloat16", "int8")])
def test_deferred_experts(wrap: Any, dtypes: tuple[str, str]) -> None:
    rng = np.random.default_rng(2)
    layers = [draw_int8_layer(rng, METHODS[0], (E, I, H)) for _ in dtypes]
    batches = [draw_batch(rng, layer.layer, 6, P) for layer in layers]

    def made(*own: str | None) -> list[Any]:
        options = {"max_deferred_experts_per_token": 1}
        return [
            layer.wrapper(P, layer_idx=i, activation_dtype=dtype, **options)
            for i, (layer, dtype) in enumerate(zip(layers, own, strict=True))
        ]

    expected = [moe.forward(*batch) for moe, batch in zip(made(*dtypes), batches, strict=True)]
    expected.append(KTMoEWrapper.drain_deferred())
    moes = made(None, None)

    def run(batches: Any) -> Any:
        outs, carry = [], None
        for moe, batch, dtype in zip(moes, batches, dtypes, strict=True):
            out, carry = moe_forward_deferred(moe, *batch, carry, activation_dtype=dtype)
            outs.append(out)
        return [*outs, moe_drain_deferred(carry, batches[0][0])]

    for found, want in zip(wrap(run)([as_jax(batch) for batch in batches]), expected, strict=True):
        assert_same_bits(numpy(found), want)


@methods
@wraps
def test_gradients_have_the_bits_of_numpy(method: Any, wrap: Any) -> None:
    rng, layer = drawn(method, 3)
    student = layer.student(rng, R)
    batch, grad = draw_training(rng, student, 6, P)
    plain = student.wrapper(P)
    for made in (None, "int8"):
        called = student.wrapper(P, activation_dtype=made)
        lora = lora_parameters(called)
        for asked, dtype in (("int8", "int8"), ("bfloat16", "bfloat16"), (None, made)):

            def loss(
                lora: Any, x: Any, weights: Any, twice: bool, called: Any = called, asked: Any = asked
            ) -> Any:
                call = partial(moe_sft, called, lora, activation_dtype=asked)
                if twice:  # the saved pass is another by then, so that this one is computed again
                    call = jax.checkpoint(call)
                out = call(x, jnp.asarray(batch.ids), weights)
                return (out.astype(jnp.float32) * jnp.asarray(grad, jnp.float32)).sum()

            plain.forward_sft(*batch, activation_dtype=dtype)
            expected = by_name(plain.backward(grad))
            for twice in (False, True):
                gradients = wrap(jax.grad(partial(loss, twice=twice), (0, 1, 2)))
                x, _, weights = as_jax(batch)
                assert_same_gradients(gradients(lora, x, weights), expected)
            out = moe_sft(called, lora, *as_jax(batch), activation_dtype=asked)
            assert_same_bits(numpy(out), plain.forward(*batch, activation_dtype=dtype))


def test_passes_that_wait_go_back_through_their_own() -> None:
    """Both passes are saved one after the other, so that the first one is computed again."""
    rng, layer = drawn(METHODS[0], 4)
    student = layer.student(rng, R)
    batch, grad = draw_training(rng, student, 6, P)
    called, plain = student.wrapper(P), student.wrapper(P)
    lora = lora_parameters(called)
    x, ids, weights = as_jax(batch)
    back = {}
    for dtype in ("int8", "bfloat16"):
        call = partial(moe_sft, called, activation_dtype=dtype)
        _, back[dtype] = jax.vjp(lambda lora, x, w, call=call: call(lora, x, ids, w), lora, x, weights)
    for dtype in ("int8", "bfloat16"):
        plain.forward_sft(*batch, activation_dtype=dtype)
        assert_same_gradients(back[dtype](jnp.asarray(grad)), by_name(plain.backward(grad)))


@wraps
def test_what_a_layer_does_not_have_is_refused_while_tracing(wrap: Any) -> None:
    rng = np.random.default_rng(5)
    layer = draw_layer(rng, E, I, H)
    batch = draw_batch(rng, layer, 6, P)
    moe, quantized = layer.wrapper(P), layer.wrapper(P, method="AMXINT4")
    sft = layer.wrapper(P, mode="sft", method="BF16_SFT", lora_rank=R)
    training = partial(moe_sft, sft, lora_parameters(sft))
    no_integers = "^activation_dtype: got int8, expected bfloat16: bf16 weights are not integers with scales"
    no_bfloat16 = "^activation_dtype: got bfloat16, expected int8: the method .* MOE_INT8 and MOE_INT4 take"
    for call, dtype, message in (
        (partial(moe_forward, moe), "int8", no_integers),
        (partial(moe_forward_deferred, moe), "int8", no_integers),
        (training, "int8", no_integers),
        (partial(moe_forward, quantized), "bfloat16", no_bfloat16),
        (partial(moe_forward_deferred, quantized), "bfloat16", no_bfloat16),
        (
            partial(moe_forward, moe),
            "int4",
            "^activation_dtype: got 'int4', expected None, 'bfloat16' or 'int8'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            wrap(partial(call, activation_dtype=dtype))(*as_jax(batch))
    with pytest.raises(ValueError, match=no_integers):
        moe_forward([moe, moe], *as_jax(batch), index=0, activation_dtype="int8")
    assert_same_bits(numpy(wrap(partial(moe_forward, moe))(*as_jax(batch))), moe.forward(*batch))
    in_int8 = wrap(partial(moe_forward, quantized, activation_dtype="int8"))(*as_jax(batch))
    assert_same_bits(numpy(in_int8), quantized.forward(*batch))
