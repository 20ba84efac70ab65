"""Deferred experts in JAX programs: the bits of the host's chain, and carries that are used once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from layers import assert_same_bits, draw_batch, draw_layer

from ktmoe_np import KTMoEWrapper

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax_cases import as_jax, numpy  # noqa: E402

from ktmoe_np.jax import moe_drain_deferred, moe_forward_deferred, raise_pending_error  # noqa: E402

pytestmark = pytest.mark.crosscheck

E, I, H, P, T = 5, 24, 40, 4, 6  # noqa: E741


def drawn(
    deferred: list[int], seed: int = 0, *, scale_inputs: bool = False, **options: Any
) -> tuple[list[Any], list[Any]]:
    rng = np.random.default_rng(seed)
    layers = [replace(draw_layer(rng, E, I, H), scale_inputs=scale_inputs) for _ in deferred]
    moes = [
        layer.wrapper(P, layer_idx=i, max_deferred_experts_per_token=d, **options)
        for i, (layer, d) in enumerate(zip(layers, deferred, strict=True))
    ]
    return moes, [draw_batch(rng, layer, T, P) for layer in layers]


def on_host(moes: list[Any], batches: list[Any]) -> list[Any]:
    outs = [moe.forward(*batch) for moe, batch in zip(moes, batches, strict=True)]
    remaining = KTMoEWrapper.drain_deferred()
    return [*outs, np.zeros_like(outs[0]) if remaining is None else remaining]


def in_program(moes: list[Any], batches: Any) -> list[Any]:
    outs, carry = [], None
    for moe, batch in zip(moes, batches, strict=True):
        out, carry = moe_forward_deferred(moe, *batch, carry)
        outs.append(out)
    return [*outs, moe_drain_deferred(carry, batches[0][0])]


@pytest.mark.parametrize("deferred", [[2, 2, 2], [1, 4, 0], [0, 0]])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("scale_inputs", [False, True])
@pytest.mark.parametrize("chunk", [4096, 4])
def test_the_bits_are_those_of_the_host(
    deferred: list[int], wrap: Any, scale_inputs: bool, chunk: int
) -> None:
    expected = on_host(*drawn(deferred, scale_inputs=scale_inputs))
    moes, batches = drawn(deferred, scale_inputs=scale_inputs, chunked_prefill_size=chunk)
    call = wrap(partial(in_program, moes))
    for _ in range(3):
        for found, want in zip(call([as_jax(batch) for batch in batches]), expected, strict=True):
            assert_same_bits(numpy(found), want)


def test_a_scan_over_layers_carries_it() -> None:
    moes, batches = drawn([2, 2, 2, 2])
    x, ids, weights = as_jax(batches[0])

    @jax.jit
    def run(x: Any) -> Any:
        def step(state: Any, index: Any) -> Any:
            x, carry = state
            out, carry = moe_forward_deferred(moes, x, ids, weights, carry, index=index)
            return (out, carry), out

        (out, carry), outs = jax.lax.scan(step, (x, jnp.zeros((), jnp.uint32)), jnp.arange(4))
        return outs, moe_drain_deferred(carry, out)

    outs, remaining = run(x)
    before = batches[0].x
    for moe, found in zip(moes, outs, strict=True):
        before = moe.forward(before, *batches[0][1:])
        assert_same_bits(numpy(found), before)
    assert_same_bits(numpy(remaining), KTMoEWrapper.drain_deferred())


def test_a_mask_and_equal_calls() -> None:
    moes, batches = drawn([2])
    moes[0].set_gpu_experts_mask(np.arange(E) < 2)
    expected = on_host(moes, batches)

    @jax.jit
    def twice(*batch: Any) -> Any:
        return [in_program(moes, [batch]) for _ in range(2)]

    for found in twice(*as_jax(batches[0])):
        for array, want in zip(found, expected, strict=True):
            assert_same_bits(numpy(array), want)


# ---- what is wrong ----


def test_a_carry_is_used_once() -> None:
    moes, batches = drawn([2, 2])
    _, carry = moe_forward_deferred(moes[0], *as_jax(batches[0]))
    moe_forward_deferred(moes[1], *as_jax(batches[1]), carry)
    with pytest.raises(Exception, match="moe_forward_deferred: carry: got one that was used before"):
        moe_forward_deferred(moes[1], *as_jax(batches[1]), carry)
    with pytest.raises(Exception, match="moe_drain_deferred: carry: got one that was used before"):
        moe_drain_deferred(carry, as_jax(batches[0])[0])


def test_carries_that_nobody_uses_are_not_kept_for_ever() -> None:
    moes, batches = drawn([2])
    _, first = moe_forward_deferred(moes[0], *as_jax(batches[0]))
    for _ in range(64):
        _, last = moe_forward_deferred(moes[0], *as_jax(batches[0]))
    with pytest.raises(Exception, match="or waited while 64 others came"):
        moe_drain_deferred(first, as_jax(batches[0])[0])
    moe_drain_deferred(last, as_jax(batches[0])[0])


def test_a_call_that_is_refused_leaves_the_carry() -> None:
    moes, batches = drawn([2, 2])
    expected = on_host(moes, batches)
    x, ids, weights = as_jax(batches[0])
    with pytest.raises(Exception, match=f"topk_ids: got expert {E} at"):
        moe_forward_deferred(moes[0], x, ids.at[2, 1].set(E), weights)
    _, carry = moe_forward_deferred(moes[0], x, ids, weights)
    x, ids, weights = as_jax(batches[1])
    with pytest.raises(
        Exception, match=r"hidden_states: got \[5, 40\], expected \[6, 40\] like the deferred"
    ):
        moe_forward_deferred(moes[1], x[:5], ids[:5], weights[:5], carry)
    with pytest.raises(Exception, match=f"topk_ids: got expert {E} at"):
        moe_forward_deferred(moes[1], x, ids.at[2, 1].set(E), weights, carry)
    with pytest.raises(
        Exception, match=r"hidden_states: got \[5, 40\], expected \[6, 40\] like the deferred"
    ):
        moe_drain_deferred(carry, x[:5])
    out, _ = moe_forward_deferred(moes[1], x, ids, weights, carry)
    assert_same_bits(numpy(out), expected[1])
    raise_pending_error()  # there is none of a GPU


def test_wrong_kinds() -> None:
    moes, batches = drawn([2])
    batch = as_jax(batches[0])
    with pytest.raises(TypeError, match=r"carry: got int32 \[\], expected what a call has returned"):
        moe_forward_deferred(moes[0], *batch, jnp.int32(1))
    with pytest.raises(TypeError, match=r"carry: got uint32 \[1\]"):
        moe_drain_deferred(jnp.zeros(1, jnp.uint32), batch[0])
    with pytest.raises(TypeError, match=r"hidden_states: got float32 \[6, 4\], expected bfloat16"):
        moe_drain_deferred(jnp.uint32(0), batch[2])
    with pytest.raises(NotImplementedError, match="ktmoe_forward_deferred"):
        jax.vmap(lambda x: moe_forward_deferred(moes[0], x, *batch[1:]))(jnp.stack([batch[0]] * 2))
    with pytest.raises(NotImplementedError, match="ktmoe_forward_deferred"):
        jax.grad(lambda w: moe_forward_deferred(moes[0], *batch[:2], w)[0].astype(jnp.float32).sum())(
            batch[2]
        )
