"""Gradients of layers in JAX programs: the bits of the NumPy API under every transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from layers import assert_same_bits, bf16, run_python
from sft_layers import by_name, draw_student, draw_training

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax_cases import STUDENTS, E, H, I, P, R, Trained, as_jax, assert_same_gradients, numpy  # noqa: E402

from ktmoe_np.jax import lora_parameters, moe_sft  # noqa: E402

pytestmark = pytest.mark.crosscheck


@pytest.fixture(scope="module", params=[*STUDENTS, "scaled inputs"])
def trained(request: pytest.FixtureRequest) -> Trained:
    return Trained(2, STUDENTS.get(request.param, "silu"), scale_inputs=request.param == "scaled inputs")


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_gradients_have_the_bits_of_numpy(trained: Trained, wrap: Callable[..., Any]) -> None:
    found = wrap(jax.grad(trained.loss, argnums=(0, 1, 2)))(*trained.arguments)
    assert_same_gradients(found, trained.expected())


@pytest.mark.parametrize("method", [("AMXINT4_SFT", 32), ("MXFP4_SFT", None)])
def test_gradients_of_other_methods(method: Any) -> None:
    rng = np.random.default_rng(5)
    student = draw_student(rng, (E, 32, 64), R, method=method)
    called, plain = student.wrapper(P), student.wrapper(P)
    batch, grad = draw_training(rng, student, 6, P)
    x, ids, weights = as_jax(batch)
    lora = lora_parameters(called)
    _, pull = jax.vjp(lambda lora, x, w: moe_sft(called, lora, x, ids, w), lora, x, weights)
    plain.forward_sft(*batch)
    assert_same_gradients(pull(jnp.asarray(grad)), by_name(plain.backward(grad)))


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_only_some_gradients(trained: Trained, argument: int) -> None:
    expected = trained.expected()
    found = jax.jit(jax.grad(trained.loss, argnums=argument))(*trained.arguments)
    if argument == 0:
        for name, value in found.items():
            assert_same_bits(numpy(value), expected[name], name)
    else:
        assert_same_bits(numpy(found), expected[("", "grad_input", "grad_weights")[argument]])
    text = str(jax.make_jaxpr(jax.grad(trained.loss, argnums=argument))(*trained.arguments))
    assert f"with_lora={argument == 0}" in text


def test_only_some_adapters(trained: Trained) -> None:
    lora, x, weights = trained.arguments
    found = jax.grad(lambda a: trained.loss({**lora, "down_lora_b": a}, x, weights))(lora["down_lora_b"])
    assert_same_bits(numpy(found), trained.expected()["down_lora_b"])


def test_gradients_have_the_dtype_of_their_adapters(trained: Trained) -> None:
    lora, x, weights = trained.arguments
    short = {name: value.astype(jnp.bfloat16) for name, value in lora.items()}
    found = jax.grad(trained.loss)(short, x, weights)
    expected = trained.expected()
    for name, value in found.items():
        assert_same_bits(numpy(value), expected[name].astype(bf16), name)


def test_a_result_that_nobody_uses_has_no_gradients(trained: Trained) -> None:
    lora, x, weights = trained.arguments
    found = jax.grad(lambda lora: 0.0 * trained.loss(lora, x, weights) + lora["gate_lora_a"].sum())(lora)
    assert (numpy(found["gate_lora_a"]) == 1).all()

    def unused(lora: Any) -> Any:
        trained.loss(lora, x, weights)
        return lora["gate_lora_a"].sum()

    assert not numpy(jax.grad(unused)(lora)["down_lora_b"]).any()


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.everything_saveable])
def test_checkpoint(trained: Trained, policy: Any) -> None:
    again = jax.checkpoint(trained.loss, policy=policy)
    found = jax.jit(jax.grad(again, argnums=(0, 1, 2)))(*trained.arguments)
    assert_same_gradients(found, trained.expected())


def test_passes_may_be_gone_back_in_any_order() -> None:
    """A layer that is called twice has kept the second pass alone; the first is computed again."""
    trained = Trained(6)
    lora, x, weights = trained.arguments
    expected = trained.expected()

    def call(x: Any) -> Any:
        return moe_sft(trained.called, lora, x, jnp.asarray(trained.batch.ids), weights)

    pulls = [jax.vjp(call, x)[1], jax.vjp(call, x * 2)[1], jax.vjp(call, x)[1]]
    grad = jnp.asarray(trained.grad)
    for at in (0, 2, 1, 0):
        found = numpy(pulls[at](grad)[0])
        assert (found == expected["grad_input"]).all() == (at != 1)
    assert trained.called.num_cached == 0


def test_passes_are_those_of_their_layer_whatever_calls_it() -> None:
    """By NumPy, under another mask, from another number of tokens: a pass is computed again then."""
    trained = Trained(12)
    lora, x, weights = trained.arguments
    ids, grad = jnp.asarray(trained.batch.ids), jnp.asarray(trained.grad)
    expected = trained.expected()["grad_input"]

    def pull_of(x: Any) -> Any:
        return jax.vjp(lambda x: moe_sft(trained.called, lora, x, ids, weights), x)[1]

    pull = pull_of(x)
    trained.called.set_gpu_experts_mask(np.arange(E) < 1)
    pull_of(x * 2)
    assert_same_bits(numpy(pull(grad)[0]), expected)
    trained.called.set_gpu_experts_mask(None)

    pull = pull_of(x)
    trained.called.clear_cache()
    trained.called.forward_sft(*trained.batch[:2], 2 * trained.batch.weights)
    assert_same_bits(numpy(pull(grad)[0]), expected)

    pull = pull_of(x)
    mapped = jax.vmap(pull)(jnp.stack([grad, grad * 2]))[0]
    assert_same_bits(numpy(mapped[0]), expected)
    assert_same_bits(numpy(jax.vmap(lambda g: pull(g)[0])(grad[None])[0]), expected)


def test_a_layer_without_adapters() -> None:
    rng = np.random.default_rng(14)
    student = draw_student(rng, (E, I, H), 0)
    called, plain = student.wrapper(P), student.wrapper(P)
    batch, grad = draw_training(rng, student, 6, P)
    x, ids, weights = as_jax(batch)
    assert lora_parameters(called) == {}
    out, pull = jax.vjp(lambda x, w: moe_sft(called, {}, x, ids, w), x, weights)
    assert_same_bits(numpy(out), plain.forward_sft(*batch))
    assert_same_gradients(({}, *pull(jnp.asarray(grad))), by_name(plain.backward(grad)))


def test_jacobians() -> None:
    trained = Trained(13)
    lora, x, weights = trained.arguments

    def few(x: Any) -> Any:
        return moe_sft(trained.called, lora, x, jnp.asarray(trained.batch.ids), weights)[0, :3]

    rows = jax.jacrev(few)(x)
    for at in range(3):
        assert_same_bits(
            numpy(rows[at]), numpy(jax.vjp(few, x)[1](jnp.zeros(3, jnp.bfloat16).at[at].set(1))[0])
        )


def test_vmap_of_gradients_and_gradients_of_vmap(trained: Trained) -> None:
    lora, x, weights = trained.arguments
    several = jnp.stack([x, x * 2])
    each = jax.jit(jax.vmap(jax.grad(trained.loss, argnums=(0, 1, 2)), in_axes=(None, 0, None)))
    found = each(lora, several, weights)
    assert_same_gradients(jax.tree.map(lambda a: a[0], found), trained.expected())
    alone = jax.grad(trained.loss, argnums=(0, 1, 2))(lora, several[1], weights)
    for one, other in zip(
        jax.tree.leaves(jax.tree.map(lambda a: a[1], found)), jax.tree.leaves(alone), strict=True
    ):
        assert_same_bits(numpy(one), numpy(other))
    total = jax.grad(lambda lora: jax.vmap(lambda x: trained.loss(lora, x, weights))(several).sum())(lora)
    for name, value in total.items():
        np.testing.assert_array_equal(numpy(value), numpy(found[0][name].sum(0)))


def test_vmap_over_inputs_alone_goes_back_in_one_call(trained: Trained) -> None:
    lora, x, weights = trained.arguments
    mapped = jax.vmap(jax.grad(trained.loss, argnums=1), in_axes=(None, 0, None))
    several = jnp.stack([x, x * 2])
    text = str(jax.make_jaxpr(mapped)(lora, several, weights))
    assert text.count("ktmoe_backward") == 1
    assert "scan" not in text
    assert_same_bits(numpy(mapped(lora, several, weights)[0]), trained.expected()["grad_input"])


def test_vmap_over_adapters(trained: Trained) -> None:
    lora, x, weights = trained.arguments
    both = jax.tree.map(lambda a: jnp.stack([a, a * 0.5]), lora)
    found = jax.vmap(trained.loss, in_axes=(0, None, None))(both, x, weights)
    assert float(found[0]) == float(trained.loss(lora, x, weights))
    assert float(found[1]) == float(trained.loss(jax.tree.map(lambda a: a * 0.5, lora), x, weights))


def test_scan_goes_back_over_layers() -> None:
    trained = [Trained(seed) for seed in (7, 8, 9)]
    layers, batch = [each.called for each in trained], trained[0].batch
    x, ids, weights = as_jax(batch)
    lora = jax.tree.map(lambda *each: jnp.stack(each), *(each.lora for each in trained))

    def scanned(lora: Any, x: Any) -> Any:
        def step(x: Any, at: Any) -> Any:
            return moe_sft(layers, at[1], x, ids, weights, index=at[0]), None

        return jax.lax.scan(step, x, (jnp.arange(3), lora))[0].astype(jnp.float32).sum()

    def one_by_one(lora: Any, x: Any) -> Any:
        for i, layer in enumerate(layers):
            x = moe_sft(layer, jax.tree.map(lambda a, i=i: a[i], lora), x, ids, weights)
        return x.astype(jnp.float32).sum()

    pair = zip(*(jax.tree.leaves(jax.jit(jax.grad(f))(lora, x)) for f in (scanned, one_by_one)), strict=True)
    for one, other in pair:
        assert_same_bits(numpy(one), numpy(other))
        assert numpy(one).any()


def test_devices_share_a_batch() -> None:
    done = run_python(
        """
        import jax, numpy as np
        import jax.numpy as jnp
        from jax.sharding import PartitionSpec as Spec
        from sft_layers import draw_student, draw_training
        from layers import assert_same_bits
        from ktmoe_np.jax import lora_parameters, moe_sft

        rng = np.random.default_rng(0)
        student = draw_student(rng, (5, 24, 40), 3)
        sft = student.wrapper(2)
        batch, grad = draw_training(rng, student, 8, 2)
        x, ids, w = map(jnp.asarray, batch)
        lora = lora_parameters(sft)
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))

        def part(lora, x, ids, w, grad):
            loss = lambda lora, x: (moe_sft(sft, lora, x, ids, w) * grad).astype(jnp.float32).sum()
            by_lora, by_x = jax.grad(loss, argnums=(0, 1))(lora, x)
            return jax.lax.psum(by_lora, "data"), by_x

        rows = Spec("data")
        shared = jax.shard_map(part, mesh=mesh, in_specs=(Spec(), rows, rows, rows, rows),
                               out_specs=(Spec(), rows), check_vma=False)
        found, by_x = jax.jit(shared)(lora, x, ids, w, jnp.asarray(grad))
        loss = lambda lora, x: (moe_sft(sft, lora, x, ids, w) * jnp.asarray(grad)).astype(jnp.float32).sum()
        alone, alone_x = jax.grad(loss, argnums=(0, 1))(lora, x)
        assert_same_bits(np.asarray(by_x), np.asarray(alone_x))
        for name, value in alone.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max())
        print(len(by_x.sharding.device_set))
        """,
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4\n"
