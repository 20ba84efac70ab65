"""Layers in JAX programs: the bits of the NumPy API under every transformation, no copies, clear errors."""

from __future__ import annotations

import doctest
import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from layers import Batch, assert_same_bits, bf16, draw_batch, draw_layer, run_python
from sft_layers import draw_student

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax_cases import E, H, I, P, R, Trained, as_jax, numpy  # noqa: E402

from ktmoe_np.jax import (  # noqa: E402
    calls,
    deferred,
    errors,
    lora_parameters,
    moe_forward,
    moe_sft,
    operands,
)

pytestmark = pytest.mark.crosscheck


@pytest.fixture(scope="module")
def case() -> tuple[Any, Batch]:
    """A layer for inference, and a batch."""
    rng = np.random.default_rng(1)
    layer = draw_layer(rng, E, I, H)
    return layer.wrapper(P), draw_batch(rng, layer, 7, P)


# ---- forward passes ----


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32])
def test_forward_has_the_bits_of_numpy(case: Any, wrap: Callable[..., Any], dtype: Any) -> None:
    moe, batch = case
    x, ids, weights = as_jax(batch)
    out = wrap(partial(moe_forward, moe))(x, ids.astype(dtype), weights)
    assert out.dtype == jnp.bfloat16
    assert_same_bits(numpy(out), moe.forward(*batch))


def test_scaled_inputs() -> None:
    rng = np.random.default_rng(2)
    plain = draw_layer(rng, E, I, H)
    moe = replace(plain, scale_inputs=True).wrapper(P)
    batch = draw_batch(rng, plain, 7, P)
    out = jax.jit(partial(moe_forward, moe))(*as_jax(batch))
    assert_same_bits(numpy(out), moe.forward(*batch))
    with pytest.raises(ValueError, match="moe: got 2 kinds of layers"):
        moe_forward([moe, plain.wrapper(P)], *as_jax(batch), index=0)


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


def test_nothing_is_copied() -> None:
    """XLA hands JAX arrays to the handlers in place, and the results are where the handlers wrote them."""
    done = run_python("""
        from jax_handlers import note_addresses
        calls = note_addresses()
        import jax, numpy as np
        from functools import partial
        from jax_cases import E, H, I, P, Trained, as_jax
        from layers import draw_batch, draw_layer
        import jax.numpy as jnp
        from ktmoe_np.jax import moe_forward, moe_sft

        rng = np.random.default_rng(1)
        layer = draw_layer(rng, E, I, H)
        x, ids, weights = as_jax(draw_batch(rng, layer, 7, P))
        out = jax.jit(partial(moe_forward, layer.wrapper(P)))(x, ids, weights).block_until_ready()
        (call,) = calls
        assert call.name == "forward"
        assert call.operands[1:] == [each.unsafe_buffer_pointer() for each in (x, ids, weights)]
        assert call.results == [out.unsafe_buffer_pointer()]

        trained = Trained(4)
        lora, x, weights = trained.arguments
        grad = jnp.asarray(trained.grad)

        def pulled(lora, x, weights, grad):
            return jax.vjp(partial(moe_sft, trained.called), lora, x, ids, weights)[1](grad)

        ids = jnp.asarray(trained.batch.ids)
        _, grad_x, _, _ = jax.block_until_ready(jax.jit(pulled)(lora, x, weights, grad))
        call = calls[-1]
        assert call.name == "backward"
        assert call.operands[1] == x.unsafe_buffer_pointer()
        assert call.operands[-1] == grad.unsafe_buffer_pointer()
        assert call.results[0] == grad_x.unsafe_buffer_pointer()
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("chunk", "num"), [(3, 3), (7, 1), (2**40, 1)])
def test_a_program_computes_chunks(case: Any, chunk: int, num: int) -> None:
    rng = np.random.default_rng(1)
    moe = draw_layer(rng, E, I, H).wrapper(P, chunked_prefill_size=chunk)
    call = jax.jit(partial(moe_forward, moe))
    x, ids, weights = as_jax(case[1])
    before = moe.cpu_infer.num_completed
    out = call(x, ids, weights).block_until_ready()
    assert moe.cpu_infer.num_completed - before == num
    assert_same_bits(numpy(out), case[0].forward(*case[1]))
    with pytest.raises(Exception, match=rf"moe_forward: topk_ids: got expert {E} at \[6, 0\]"):
        call(x, ids.at[6, 0].set(E), weights).block_until_ready()


def test_a_long_batch_takes_no_more_memory_than_from_numpy() -> None:
    """Scratch is that of a chunk; ids are converted chunk by chunk."""
    done = run_python("""
        import jax, numpy as np
        from functools import partial
        from layers import draw_batch, draw_layer
        from jax_cases import as_jax
        from ktmoe_np.jax import moe_forward

        def peak():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10

        def growth(call, *batch):
            call(*(part[:5000] for part in batch))
            with open("/proc/self/clear_refs", "w") as refs:
                refs.write("5")  # the peak is what is taken now
            before = peak()
            call(*batch)
            return peak() - before

        rng = np.random.default_rng(1)
        layer = draw_layer(rng, 8, 16, 16)
        moe, batch = layer.wrapper(8), draw_batch(rng, layer, 100_000, 8)
        program = jax.jit(partial(moe_forward, moe))
        program.lower(*as_jax(batch)).compile()
        from_numpy = growth(moe.forward, *batch)
        from_jax = growth(lambda *batch: program(*batch).block_until_ready(), *as_jax(batch))
        result = 100_000 * 16 * 2
        assert from_numpy < result + (8 << 20), from_numpy
        assert from_jax < result + (16 << 20), from_jax  # 107 MB of scratch if it was computed at once
    """)
    assert done.returncode == 0, done.stderr


def test_examples() -> None:
    for module in (calls, deferred, errors):
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert found.failed == 0


# ---- what is wrong ----


def test_programs_are_for_the_cpu_or_cuda(case: Any) -> None:
    moe, batch = case
    traced = jax.jit(partial(moe_forward, moe)).trace(*as_jax(batch))
    assert "ktmoe_np.forward" in traced.lower(lowering_platforms=("cuda",)).as_text()
    with pytest.raises(
        NotImplementedError, match=r"ktmoe_np.forward: got a program for tpu, expected cpu or"
    ):
        traced.lower(lowering_platforms=("tpu",))


def test_calls_after_the_engine_was_reset() -> None:
    done = run_python(
        """
        import gc, jax, jax.numpy as jnp, numpy as np
        from functools import partial
        from layers import draw_batch, draw_layer
        from ktmoe_np.cpuinfer import _MoEBase
        from ktmoe_np.jax import moe_forward

        rng = np.random.default_rng(0)
        layer = draw_layer(rng, 3, 16, 24)
        moe, batch = layer.wrapper(2), [jnp.asarray(part) for part in draw_batch(rng, layer, 4, 2)]
        compiled = jax.jit(partial(moe_forward, moe)).lower(*batch).compile()
        before = np.asarray(compiled(*batch))
        del moe
        gc.collect()
        _MoEBase.reset_cpu_infer()
        try:
            compiled(*batch)
        except Exception as error:
            print(str(error).splitlines()[0])
        moe = layer.wrapper(2)
        assert (np.asarray(moe_forward(moe, *batch)) == before).all()
        """
    )
    assert done.returncode == 0, done.stderr
    assert "moe_forward: the layer is gone, expected one that lives as long as the programs" in done.stdout


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


@pytest.mark.parametrize("wrong", [np.uint32(2**32 - 1), np.int64(2**32 + 1), np.uint64(2**63)])
def test_ids_that_fit_nowhere(case: Any, wrong: Any) -> None:
    moe, batch = case
    ids = batch.ids.astype(wrong.dtype)
    ids[2, 1] = wrong
    # Which class it is depends on the version of JAX.
    with pytest.raises((RuntimeError, ValueError), match=r"topk_ids: got expert 5 at \[2, 1\]"):
        moe_forward(moe, batch.x, ids, batch.weights).block_until_ready()
    as_traced = jnp.asarray(np.where(batch.ids == 0, 2**32 - 1, batch.ids).astype(np.uint32))
    with pytest.raises(RuntimeError, match="topk_ids: got expert 5"):
        jax.jit(partial(moe_forward, moe))(batch.x, as_traced, batch.weights).block_until_ready()


def test_a_mask_has_one_number(case: Any) -> None:
    moe, batch = case
    for _ in range(5):
        moe.set_gpu_experts_mask(np.arange(E) < 2)
        moe_forward(moe, *batch)
        moe.set_gpu_experts_mask(None)
        moe_forward(moe, *batch)
    assert len(operands._numbers[moe]) == 2


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
        (
            {"ids": np.zeros((7, 3), np.int32)},
            ValueError,
            r"topk_ids: got int32 \[7, 3\], expected integers \[7, 2\]",
        ),
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
        TypeError, match="moe: got NativeSFTMoEWrapper, expected a BaseMoEWrapper, of mode 'inference'"
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
    with pytest.raises(ValueError, match=r"sft: got lora_dropout 0\.5, expected 0 in a JAX program"):
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
def test_wrong_adapters(change: dict[str, Any], error: Any, message: str) -> None:
    trained = Trained(2)
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
