"""JAX programs on a real GPU with experts on the CPU, in processes of their own: others keep JAX off it."""

from __future__ import annotations

import shutil
import textwrap

import pytest
from layers import run_python

jax = pytest.importorskip("jax")

BEGIN = """
import os
os.environ["JAX_PLATFORMS"] = "cuda,cpu"
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from layers import assert_same_bits, bf16, draw, draw_batch, draw_layer
from ktmoe_np import KTMoEWrapper
from ktmoe_np.jax import (
    lora_parameters, moe_drain_deferred, moe_forward, moe_forward_deferred, moe_sft, raise_pending_error
)
E, I, H, P, T = 5, 24, 40, 4, 6
rng = np.random.default_rng(0)
layers = [draw_layer(rng, E, I, H) for _ in range(4)]
batch = draw_batch(rng, layers[0], T, P)
x, ids, weights = map(jnp.asarray, batch)
assert x.devices().pop().platform == "gpu"
"""


def has_gpu() -> bool:
    """Whether JAX finds one, tested in another process."""
    if shutil.which("nvidia-smi") is None:
        return False
    script = "import os; os.environ['JAX_PLATFORMS'] = 'cuda'; import jax; jax.devices()"
    return run_python(script).returncode == 0


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.crosscheck,
    pytest.mark.skipif(not has_gpu(), reason="JAX finds no GPU"),
]


def run(script: str) -> str:
    done = run_python("\n".join(map(textwrap.dedent, (BEGIN, script))))
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_forward_passes() -> None:
    run("""
        moes = [layer.wrapper(P, layer_idx=i) for i, layer in enumerate(layers)]
        expected = batch.x
        for moe in moes:
            expected = moe.forward(expected * bf16.type(2), *batch[1:])

        def program(x, ids, weights):
            for moe in moes:
                x = moe_forward(moe, x * 2, ids, weights)
            return x

        for call in (program, jax.jit(program)):
            for _ in range(5):
                found = call(x, ids, weights)
            assert found.devices().pop().platform == "gpu"
            assert_same_bits(np.asarray(found), expected)

        def scanned(x):
            step = lambda x, i: (moe_forward(moes, x * 2, ids, weights, index=i), None)
            return jax.lax.scan(step, x, jnp.arange(4))[0]

        assert_same_bits(np.asarray(jax.jit(scanned)(x)), expected)
        """)


def test_many_calls_of_many_sizes_in_flight() -> None:
    run("""
        moe = layers[0].wrapper(P)
        batches = [draw_batch(rng, layers[0], size, P) for size in (1, 3000, 2, 700, 20000, 5)]
        found = [[moe_forward(moe, *one) for one in batches] for _ in range(3)]
        for each in found:
            for one, result in zip(batches, each):
                assert_same_bits(np.asarray(result), moe.forward(*one))
        """)


def test_deferred_experts() -> None:
    run("""
        moes = [
            layer.wrapper(P, layer_idx=i, max_deferred_experts_per_token=2) for i, layer in enumerate(layers)
        ]
        expected, before = [], batch.x
        for moe in moes:
            before = moe.forward(before, *batch[1:])
            expected.append(before)
        expected.append(KTMoEWrapper.drain_deferred())

        @jax.jit
        def program(x):
            outs, carry = [], None
            for moe in moes:
                x, carry = moe_forward_deferred(moe, x, ids, weights, carry)
                outs.append(x)
            return [*outs, moe_drain_deferred(carry, x)]

        for _ in range(10):
            for found, want in zip(program(x), expected, strict=True):
                assert_same_bits(np.asarray(found), want)
        """)


def test_training() -> None:
    run("""
        sft = KTMoEWrapper(0, E, P, H, I, mode="sft", method="AMXBF16_SFT", lora_rank=3)
        sft.load_weights_from_tensors(layers[0].gate_proj, layers[0].up_proj, layers[0].down_proj)
        lora = lora_parameters(sft)
        lora = {name: a + 0.01 * (1 + jnp.arange(a.size).reshape(a.shape) % 7) for name, a in lora.items()}

        def loss(lora, x, weights):
            return (moe_sft(sft, lora, x, ids, weights).astype(jnp.float32) ** 2).sum()

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        on_gpu = step(lora, x, weights)
        cpu = jax.devices("cpu")[0]
        with jax.default_device(cpu):
            ids = jax.device_put(ids, cpu)
            given = jax.device_put((lora, x, weights), cpu)
            on_cpu = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*given)
        for found, want in zip(jax.tree.leaves(on_gpu[1]), jax.tree.leaves(on_cpu[1]), strict=True):
            assert_same_bits(np.asarray(found), np.asarray(want))
        assert on_gpu[0].devices().pop().platform == "gpu"
        """)


def test_errors_come_with_a_later_call() -> None:
    said = run("""
        moe = layers[0].wrapper(P)
        call = jax.jit(partial(moe_forward, moe))
        out = call(x, ids.at[2, 1].set(E), weights)
        assert np.isnan(np.asarray(out).astype(np.float32)).all()
        try:
            raise_pending_error()
        except IndexError as error:
            print(error)
        out = np.asarray(call(x, ids.at[2, 1].set(E), weights))
        try:
            call(x, ids, weights).block_until_ready()
        except Exception as error:
            print(str(error).splitlines()[0])
        assert_same_bits(np.asarray(call(x, ids, weights)), moe.forward(*batch))
        """)
    first, second = said.splitlines()
    assert first.startswith("topk_ids: got expert 5 at [2, 1]")
    assert "moe_forward: topk_ids: got expert 5 at [2, 1]" in second


def test_experts_of_the_mask_are_computed_in_the_program() -> None:
    run("""
        from gpu_cases import JAX, assert_sum_close, gpu_experts
        from layers import assert_close
        mask = np.array([True, False, False, True, True])
        layer = draw_layer(rng, E, I, H, with_biases=True)
        moe, batch = layer.wrapper(P, gpu_experts_mask=mask), draw_batch(rng, layer, T, P)
        gpu = gpu_experts(moe, layer, mask, JAX)
        parts = jax.jit(lambda *batch: (moe_forward(moe, *batch), gpu.forward(*batch)))
        here, partial = parts(*JAX.batch(batch))
        assert partial.devices().pop().platform == "gpu"
        assert_close(JAX.give(partial), layer, batch, gpu_experts_mask=~mask)
        assert_sum_close(JAX.give(jax.jit(gpu.add)(here, partial)), layer, batch, mask)
        """)
