"""Layers in JAX programs: the bits of the NumPy API under every transformation, no copies, clear errors."""

from __future__ import annotations

import doctest
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from layers import AnyArray, Batch, assert_same_bits, bf16, draw_batch, draw_layer, run_python
from sft_layers import Student, by_name, draw_student, draw_training

from ktmoe_np import kt_kernel_ext as ext

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import ktmoe_np.jax as adapter  # noqa: E402
from ktmoe_np.jax import lora_parameters, moe_forward, moe_sft  # noqa: E402

E, I, H, P, R = 5, 24, 40, 2, 3  # noqa: E741

#: The ungated one has no adapters of up.
STUDENTS = {"gated": "silu", "ungated": "relu2"}


def numpy(x: Any) -> AnyArray:
    return np.asarray(x)


def as_jax(batch: Batch) -> tuple[Any, Any, Any]:
    return jnp.asarray(batch.x), jnp.asarray(batch.ids), jnp.asarray(batch.weights)


@pytest.fixture(scope="module")
def case() -> tuple[Any, Batch]:
    """A layer for inference, and a batch."""
    rng = np.random.default_rng(1)
    layer = draw_layer(rng, E, I, H)
    return layer.wrapper(P), draw_batch(rng, layer, 7, P)


class Trained:
    """A layer with adapters in both worlds: one that programs call, another that NumPy calls."""

    def __init__(self, seed: int, activation: str = "silu", method: Any = ("AMXBF16_SFT", None)) -> None:
        rng = np.random.default_rng(seed)
        student: Student = draw_student(rng, (E, I, H), R, activation, method=method)
        self.called, self.plain = student.wrapper(P), student.wrapper(P)
        self.batch, self.grad = draw_training(rng, student, 6, P)
        self.lora = lora_parameters(self.called)

    def loss(self, lora: Any, x: Any, weights: Any, ids: Any = None) -> Any:
        ids = jnp.asarray(self.batch.ids) if ids is None else ids
        out = moe_sft(self.called, lora, x, ids, weights)
        return (out.astype(jnp.float32) * jnp.asarray(self.grad, jnp.float32)).sum()

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        return self.lora, jnp.asarray(self.batch.x), jnp.asarray(self.batch.weights)

    def expected(self) -> dict[str, AnyArray]:
        """The gradients by NumPy, of the sum of out * grad."""
        self.plain.update_lora_weights(**{name: numpy(value) for name, value in self.lora.items()})
        self.plain.forward_sft(*self.batch)
        return by_name(self.plain.backward(self.grad))


@pytest.fixture(scope="module", params=STUDENTS.values(), ids=STUDENTS)
def trained(request: pytest.FixtureRequest) -> Trained:
    return Trained(2, request.param)


def assert_same_gradients(found: tuple[Any, Any, Any], expected: dict[str, AnyArray]) -> None:
    lora, x, weights = found
    got = {"grad_input": x, "grad_weights": weights, **lora}
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert_same_bits(numpy(value), expected[name], name)


# ---- forward passes ----


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32])
def test_forward_has_the_bits_of_numpy(case: Any, wrap: Callable[..., Any], dtype: Any) -> None:
    moe, batch = case
    x, ids, weights = as_jax(batch)
    out = wrap(partial(moe_forward, moe))(x, ids.astype(dtype), weights)
    assert out.dtype == jnp.bfloat16
    assert_same_bits(numpy(out), moe.forward(*batch))


def test_numpy_arrays_are_taken(case: Any) -> None:
    moe, batch = case
    assert_same_bits(numpy(moe_forward(moe, *batch)), moe.forward(*batch))


def test_leading_axes_are_rows(case: Any) -> None:
    moe, batch = case
    doubled = [jnp.asarray(np.stack([part, part[::-1]])) for part in batch]
    out = jax.jit(partial(moe_forward, moe))(*doubled)
    assert out.shape == (2, 7, H)
    assert_same_bits(numpy(out[1]), moe.forward(*batch)[::-1])
    single = moe_forward(moe, *(part[0] for part in as_jax(batch)))
    assert_same_bits(numpy(single), moe.forward(*batch)[0])
    assert moe_forward(moe, *(part[:0] for part in as_jax(batch))).shape == (0, H)


def test_ids_of_64_bits() -> None:
    done = run_python("""
        import jax, numpy as np
        from layers import draw_batch, draw_layer, assert_same_bits
        jax.config.update("jax_enable_x64", True)
        import jax.numpy as jnp
        from ktmoe_np.jax import moe_forward
        rng = np.random.default_rng(0)
        layer = draw_layer(rng, 3, 8, 16)
        moe, batch = layer.wrapper(2), draw_batch(rng, layer, 4, 2)
        x, ids, w = map(jnp.asarray, batch)
        assert ids.dtype == jnp.int64
        call = jax.jit(lambda *arguments: moe_forward(moe, *arguments))
        assert_same_bits(np.asarray(call(x, ids, w)), moe.forward(*batch))
        try:
            call(x, ids, w.astype(jnp.float64))
        except TypeError as error:
            print(error)
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "topk_weights: got float64 [4, 2], expected float32 [4, 2]\n"


def test_experts_of_someone_else_are_skipped(case: Any) -> None:
    moe, batch = case
    call = jax.jit(partial(moe_forward, moe))
    whole = numpy(call(*as_jax(batch)))
    try:
        moe.set_gpu_experts_mask(np.arange(E) < 2)
        masked = moe.forward(*batch)
        assert_same_bits(numpy(jax.jit(partial(moe_forward, moe))(*as_jax(batch))), masked)
        assert_same_bits(numpy(call(*as_jax(batch))), whole)  # traced before
    finally:
        moe.set_gpu_experts_mask(None)
    assert (masked != whole).any()


def test_vmap_is_one_call_of_more_rows(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, batch = case
    x, ids, weights = as_jax(batch)
    several = jnp.stack([x, x[::-1], x * 2])
    mapped = jax.vmap(lambda x: moe_forward(moe, x, ids, weights))
    assert str(jax.make_jaxpr(mapped)(several)).count("ktmoe_forward") == 1
    out = jax.jit(mapped)(several)
    for one, found in zip(several, out, strict=True):
        assert_same_bits(numpy(found), moe.forward(numpy(one), *batch[1:]))
    inner = jax.vmap(partial(moe_forward, moe), in_axes=(1, 1, 1), out_axes=1)
    assert_same_bits(numpy(inner(*(part[None] for part in as_jax(batch)))[0]), moe.forward(*batch))


def test_scan_goes_over_layers() -> None:
    rng = np.random.default_rng(3)
    layers = [draw_layer(rng, E, I, H) for _ in range(3)]
    moes, batch = [layer.wrapper(P) for layer in layers], draw_batch(rng, layers[0], 4, P)
    x, ids, weights = as_jax(batch)

    def step(x: Any, index: Any) -> Any:
        return moe_forward(moes, x, ids, weights, index=index), None

    out = jax.jit(lambda x: jax.lax.scan(step, x, jnp.arange(3))[0])(x)
    expected = batch.x
    for moe in moes:
        expected = moe.forward(expected, *batch[1:])
    assert_same_bits(numpy(out), expected)
    picked = jax.vmap(lambda i: moe_forward(moes, x, ids, weights, index=i))(jnp.array([2, 0]))
    assert_same_bits(numpy(picked[0]), moes[2].forward(*batch))


def test_nothing_is_copied(case: Any) -> None:
    moe, batch = case
    x, ids, weights = as_jax(batch)
    out = jax.jit(partial(moe_forward, moe))(x, ids, weights).block_until_ready()
    seen = ext.xla.last_addresses()
    assert seen["hidden_states"] == x.unsafe_buffer_pointer()
    assert seen["out"] == out.unsafe_buffer_pointer()


def test_nothing_is_copied_on_the_way_back() -> None:
    trained = Trained(4)
    lora, x, weights = trained.arguments

    def pulled(lora: Any, x: Any, weights: Any, grad: Any) -> Any:
        ids = jnp.asarray(trained.batch.ids)
        return jax.vjp(partial(moe_sft, trained.called), lora, x, ids, weights)[1](grad)

    grad = jnp.asarray(trained.grad)
    found = jax.block_until_ready(jax.jit(pulled)(lora, x, weights, grad))
    seen = ext.xla.last_addresses()
    assert seen["hidden_states"] == x.unsafe_buffer_pointer()
    assert seen["grad_output"] == grad.unsafe_buffer_pointer()
    assert seen["grad_input"] == found[1].unsafe_buffer_pointer()


# ---- gradients ----


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


def test_examples() -> None:
    found = doctest.testmod(adapter)
    assert found.attempted > 0
    assert found.failed == 0


# ---- what is wrong ----


def test_a_layer_that_is_gone() -> None:
    rng = np.random.default_rng(10)
    layer = draw_layer(rng, E, I, H)
    moe, batch = layer.wrapper(P), draw_batch(rng, layer, 2, P)
    compiled = jax.jit(partial(moe_forward, moe)).lower(*as_jax(batch)).compile()
    assert compiled(*as_jax(batch)).shape == (2, H)
    del moe
    gc.collect()
    jax.clear_caches()
    gc.collect()
    with pytest.raises(RuntimeError, match="moe_forward: the layer is gone, expected one that lives as long"):
        compiled(*as_jax(batch)).block_until_ready()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_ids_that_are_none(case: Any, wrap: Callable[..., Any]) -> None:
    moe, batch = case
    x, ids, weights = as_jax(batch)
    call = wrap(partial(moe_forward, moe))
    with pytest.raises(RuntimeError, match=r"OUT_OF_RANGE: moe_forward: topk_ids: got expert 5 at \[3, 1\]"):
        call(x, ids.at[3, 1].set(E), weights).block_until_ready()
    assert_same_bits(numpy(call(x, ids, weights)), moe.forward(*batch))


def test_wrong_ids_of_a_training_pass_leave_nothing_behind() -> None:
    trained = Trained(11)
    lora, x, weights = trained.arguments
    wrong = jnp.asarray(trained.batch.ids).at[0, 0].set(E)
    step = jax.jit(jax.grad(trained.loss))
    with pytest.raises(RuntimeError, match=f"moe_sft: topk_ids: got expert {E}"):
        jax.block_until_ready(step(lora, x, weights, wrong))
    assert trained.called.num_cached == 0
    for name, value in step(lora, x, weights).items():
        assert_same_bits(numpy(value), trained.expected()[name], name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": np.zeros((7, H), np.float32)},
            TypeError,
            r"hidden_states: got float32 \[7, 40\], expected bfloat16",
        ),
        ({"x": np.zeros((7, 8), bf16)}, ValueError, r"hidden_states: got bfloat16 \[7, 8\], expected .*40\]"),
        ({"x": np.zeros((), bf16)}, ValueError, r"hidden_states: got bfloat16 \[\]"),
        (
            {"ids": np.zeros((7, P), np.float32)},
            TypeError,
            r"topk_ids: got float32 \[7, 2\], expected integers",
        ),
        ({"ids": np.zeros((7, 3), np.int32)}, ValueError, r"topk_ids: got int32 \[7, 3\], expected \[7, 2\]"),
        (
            {"weights": np.zeros((7, P), bf16)},
            TypeError,
            r"topk_weights: got bfloat16 \[7, 2\], expected float32",
        ),
        (
            {"weights": np.zeros((6, P), np.float32)},
            ValueError,
            r"topk_weights: got float32 \[6, 2\], expected",
        ),
    ],
)
def test_wrong_arrays(case: Any, change: dict[str, Any], error: Any, message: str) -> None:
    moe, batch = case
    arguments = {"x": batch.x, "ids": batch.ids, "weights": batch.weights, **change}
    with pytest.raises(error, match=message):
        jax.jit(partial(moe_forward, moe))(*arguments.values())


def test_wrong_layers(case: Any) -> None:
    moe, batch = case
    rng = np.random.default_rng(12)
    other = draw_layer(rng, E, I + 1, H).wrapper(P)
    sft = draw_student(rng, (E, I, H), R).wrapper(P)
    dropping = draw_student(rng, (E, I, H), R).wrapper(P, lora_dropout=0.5)
    arrays = as_jax(batch)
    with pytest.raises(
        TypeError, match="moe: got AMXSFTMoEWrapper, expected a BaseMoEWrapper, of mode 'inference'"
    ):
        moe_forward(sft, *arrays)
    with pytest.raises(TypeError, match=r"sft: got .*, expected a BaseSFTMoEWrapper, of mode 'sft'"):
        moe_sft(moe, {}, *arrays)
    with pytest.raises(TypeError, match="moe: got int, expected a BaseMoEWrapper"):
        moe_forward([moe, 3], *arrays, index=0)
    with pytest.raises(
        ValueError, match="moe: got 2 kinds of layers, expected one or more of the same sizes"
    ):
        moe_forward([moe, other], *arrays, index=0)
    with pytest.raises(ValueError, match="moe: got 0 kinds of layers"):
        moe_forward([], *arrays, index=0)
    with pytest.raises(ValueError, match="index: got None, expected an integer"):
        moe_forward([moe], *arrays)
    with pytest.raises(ValueError, match="index: got 0, expected None"):
        moe_forward(moe, *arrays, index=0)
    with pytest.raises(ValueError, match=r"index: got shape \[1\], expected a single integer"):
        moe_forward([moe], *arrays, index=jnp.array([0]))
    with pytest.raises(ValueError, match=r"sft: got lora_dropout 0\.5, expected 0 in a program of JAX"):
        moe_sft(dropping, lora_parameters(dropping), *arrays)


def test_a_layer_without_weights(case: Any) -> None:
    from ktmoe_np import KTMoEWrapper

    moe = KTMoEWrapper(3, E, P, H, I)
    with pytest.raises(RuntimeError, match="moe: layer 3 has no weights yet"):
        moe_forward(moe, *as_jax(case[1]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"gate_lora_a": None},
            ValueError,
            r"lora: got no 'gate_lora_a', expected float32 or bfloat16 \[5, 3, 40\]",
        ),
        ({"extra": 1.0}, ValueError, "lora: got 'extra', expected gate_lora_a, gate_lora_b"),
        (
            {"gate_lora_a": np.zeros((E, R, 8), np.float32)},
            ValueError,
            r"gate_lora_a: got float32 \[5, 3, 8\]",
        ),
        ({"gate_lora_a": np.zeros((E, R, H), np.float16)}, TypeError, "gate_lora_a: got float16"),
    ],
)
def test_wrong_adapters(trained: Trained, change: dict[str, Any], error: Any, message: str) -> None:
    lora = {name: value for name, value in {**trained.lora, **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        trained.loss(lora, *trained.arguments[1:])


def test_inference_has_no_derivative(case: Any) -> None:
    moe, batch = case
    x, ids, weights = as_jax(batch)
    with pytest.raises(
        TypeError, match="moe_forward: has no derivative; moe_sft has, with a layer of mode 'sft'"
    ):
        jax.grad(lambda x: moe_forward(moe, x, ids, weights).astype(jnp.float32).sum())(x)
