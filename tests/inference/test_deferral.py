"""Deferred experts: what a layer leaves for the next one, against a composition of the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    IS_SLOW,
    Batch,
    Layer,
    assert_close,
    assert_same_bits,
    bf16,
    draw,
    draw_batch,
    draw_layer,
    num_examples,
    run_python,
)

from ktmoe_np import KExpertsCPUBuffer, KTMoEWrapper
from ktmoe_np.reference import assert_within, error_bound, moe_forward

pytestmark = pytest.mark.kernels

AnyArray = Any

E, I, H, P, T = 5, 24, 40, 4, 7  # noqa: E741


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    KTMoEWrapper.drain_deferred()
    yield
    KTMoEWrapper.drain_deferred()


def immediate_slots(weights: AnyArray, num_deferred: int) -> AnyArray:
    """Of each token the slots with the largest weights, ties by slot; said otherwise than in the package."""
    chosen = np.zeros(weights.shape, np.bool_)
    for t, row in enumerate(weights.tolist()):
        by_weight = sorted(range(len(row)), key=lambda p: (-row[p], p))
        chosen[t, by_weight[: len(row) - num_deferred]] = True
    return chosen


def parts(batch: Batch, num_deferred: int) -> tuple[Batch, Batch]:
    """What a layer computes at once, and what it defers."""
    now = immediate_slots(batch.weights, num_deferred)
    return batch._replace(ids=np.where(now, batch.ids, -1)), batch._replace(ids=np.where(now, -1, batch.ids))


def alone(layer: Layer, batch: Batch, dtype: Any = np.float32, base: AnyArray | None = None) -> AnyArray:
    """The layer outside of any chain."""
    moe, out = layer.wrapper(batch.ids.shape[1]), np.full(batch.x.shape, np.nan, dtype)
    moe.cpu_infer.run(moe._layer.forward_task(*batch, out, base=base))
    return out


def carried(layer: Layer, batch: Batch, num_deferred: int) -> AnyArray:
    """The engine's own sum of what is deferred, float32."""
    return alone(layer, parts(batch, num_deferred)[1])


def drawn(
    seed: int, num_layers: int, num_tokens: int = T, num_slots: int = P, *, scale_inputs: bool = False
) -> tuple[list[Layer], list[Batch]]:
    rng = np.random.default_rng(seed)
    layers = [draw_layer(rng, E, I, H, with_biases=True) for _ in range(num_layers)]
    layers = [replace(layer, scale_inputs=scale_inputs) for layer in layers]
    return layers, [draw_batch(rng, layer, num_tokens, num_slots) for layer in layers]


def wrappers(layers: Sequence[Layer], num_deferred: Sequence[int], **options: Any) -> list[Any]:
    return [
        layer.wrapper(P, layer_idx=i, max_deferred_experts_per_token=d, **options)
        for i, (layer, d) in enumerate(zip(layers, num_deferred, strict=True))
    ]


def run_pass(moes: Sequence[Any], batches: Sequence[Batch], how: str = "forward") -> list[AnyArray]:
    """The float32 outputs of the layers one after the other; the last one's deferred output remains."""
    results = []
    for moe, batch in zip(moes, batches, strict=True):
        out = np.full(batch.x.shape, np.nan, np.float32)
        if how == "forward":
            moe.forward(*batch, out=out)
        else:
            moe.submit_forward(*batch, out=out)
            moe.sync_forward()
        results.append(out)
    return results


@settings(deadline=None, max_examples=num_examples(40))
@given(
    seed=st.integers(0, 2**32 - 1),
    deferred=st.lists(st.integers(0, P), min_size=1, max_size=5),
    num_tokens=st.sampled_from([0, 1, 7, 20]),
    chunk=st.sampled_from([4096, 3]),
    how=st.sampled_from(["forward", "submit"]),
    scale_inputs=st.booleans(),
)
def test_a_pass_is_what_the_reference_composes(
    seed: int, deferred: list[int], num_tokens: int, chunk: int, how: str, scale_inputs: bool
) -> None:
    KTMoEWrapper.drain_deferred()
    layers, batches = drawn(seed, len(deferred), num_tokens, scale_inputs=scale_inputs)
    outputs = run_pass(wrappers(layers, deferred, chunked_prefill_size=chunk), batches, how)
    remaining = KTMoEWrapper.drain_deferred()

    base, base_error = np.zeros((num_tokens, H)), np.zeros((num_tokens, H))
    for layer, batch, num, output in zip(layers, batches, deferred, outputs, strict=True):
        now, later = parts(batch, num)
        model = {"scale_inputs": scale_inputs, **layer.biases}
        exact = {"accumulate_dtype": np.float64, "out_dtype": np.float64, **model}
        bounded = {"out_dtype": np.float32, "sigmas": 6.0, **model}
        truth = moe_forward(*now, *layer.matrices, base=base, **exact)
        bound = error_bound(*now, *layer.matrices, base=base, **bounded) + base_error
        assert_within(output, truth, bound)
        base = moe_forward(*later, *layer.matrices, **exact)
        base_error = error_bound(*later, *layer.matrices, **bounded)
    if deferred[-1] == 0:
        assert remaining is None
    else:
        assert remaining is not None
        assert remaining.dtype == bf16
        assert_close(remaining, layers[-1], parts(batches[-1], deferred[-1])[1])
    assert KTMoEWrapper.drain_deferred() is None


@pytest.mark.parametrize("how", ["forward", "submit"])
@pytest.mark.parametrize("scale_inputs", [False, True])
def test_the_bits_of_a_pass(how: str, scale_inputs: bool) -> None:
    """The next output starts from the unrounded float32 sum, whatever dtype it has itself."""
    layers, batches = drawn(1, 3, scale_inputs=scale_inputs)
    moes = wrappers(layers, [2, 1, 3])
    outs = [
        np.empty(batch.x.shape, dtype) for batch, dtype in zip(batches, (bf16, np.float32, bf16), strict=True)
    ]
    for moe, batch, out in zip(moes, batches, outs, strict=True):
        if how == "forward":
            assert moe.forward(*batch, out=out) is out
        else:
            moe.submit_forward(*batch, out=out)
            assert moe.sync_forward() is out
    remaining = KTMoEWrapper.drain_deferred()

    base = None
    for layer, batch, num, out in zip(layers, batches, (2, 1, 3), outs, strict=True):
        assert_same_bits(out, alone(layer, parts(batch, num)[0], out.dtype, base))
        base = carried(layer, batch, num)
    assert base is not None
    assert_same_bits(remaining, base.astype(bf16))


def test_ties_go_to_the_lower_slot() -> None:
    (layer,), (batch,) = drawn(2, 1)
    batch = batch._replace(weights=np.full((T, P), 0.25, np.float32))
    (moe,) = wrappers([layer], [1])
    ids = batch.ids.copy()
    ids[:, -1] = -1
    assert_same_bits(moe.forward(*batch), alone(layer, batch._replace(ids=ids), bf16))
    assert_same_bits(KTMoEWrapper.drain_deferred(), carried(layer, batch, 1).astype(bf16))


def test_weights_are_compared_as_they_are() -> None:
    """Negative ones are small, a skipped slot has its place, infinities count, NaN is the last."""
    (layer,), (batch,) = drawn(3, 1, 2)
    weights = np.float32([[-3.0, 2.0, -1.0, 0.5], [np.inf, 1.0, -np.inf, 2.0]])
    batch = batch._replace(weights=weights)
    batch.ids[0, 1] = -1
    (moe,) = wrappers([layer], [2])
    expected = alone(layer, parts(batch, 2)[0], bf16)
    np.testing.assert_array_equal(moe.forward(*batch).astype(np.float32), expected.astype(np.float32))
    assert immediate_slots(weights, 2).tolist() == [[False, True, False, True], [True, False, False, True]]


def test_all_experts_deferred() -> None:
    layers, batches = drawn(4, 2)
    first, second = wrappers(layers, [P, 0])
    assert not first.forward(*batches[0]).astype(np.float32).any()
    out = second.forward(*batches[1], out=np.empty((T, H), np.float32))
    assert_same_bits(out, alone(layers[1], batches[1], base=carried(layers[0], batches[0], P)))


def test_a_layer_that_defers_nothing_ends_the_chain() -> None:
    layers, batches = drawn(5, 3)
    moes = wrappers(layers, [1, 0, 0])
    outputs = run_pass(moes, batches)
    assert KTMoEWrapper.drain_deferred() is None
    assert_same_bits(outputs[2], alone(layers[2], batches[2]))


@pytest.mark.parametrize("numbers", [(0, 2), (1, 3, 5), (0, 7, 8)])
def test_layers_with_gaps_between_them(numbers: tuple[int, ...]) -> None:
    """Dense layers lie between; then two neighbors may use the same slot of the buffer."""
    layers, batches = drawn(6, len(numbers))
    moes = [
        layer.wrapper(P, layer_idx=number, max_deferred_experts_per_token=2)
        for layer, number in zip(layers, numbers, strict=True)
    ]
    outputs = run_pass(moes, batches)
    remaining = KTMoEWrapper.drain_deferred()
    expected = run_pass(wrappers(layers, [2] * len(numbers)), batches)
    for output, want in zip(outputs, expected, strict=True):
        assert_same_bits(output, want)
    assert_same_bits(remaining, KTMoEWrapper.drain_deferred())


def test_passes_of_many_sizes_in_turn() -> None:
    sizes = (7, 1, 7, 300 if not IS_SLOW else 30, 1, 7)
    layers, _ = drawn(7, 3)
    rng = np.random.default_rng(8)
    every = {size: [draw_batch(rng, layer, size, P) for layer in layers] for size in set(sizes)}
    moes = wrappers(layers, [2, 2, 2])
    expected: dict[int, Any] = {}
    for size in sizes:
        outputs = [*run_pass(moes, every[size]), KTMoEWrapper.drain_deferred()]
        for output, want in zip(outputs, expected.setdefault(size, outputs), strict=True):
            assert_same_bits(output, want)


def test_passes_that_are_submitted_without_a_pause() -> None:
    """Deferred results are awaited only where they are used, and their slots are not overwritten before."""
    layers, batches = drawn(9, 4, 40)
    moes = wrappers(layers, [3] * 4)
    expected = None
    for _ in range(3 if IS_SLOW else 20):
        for moe, batch in zip(moes, batches, strict=True):
            moe.submit_forward(*batch)
        outputs = [*(moe.sync_forward() for moe in moes), KTMoEWrapper.drain_deferred()]
        expected = expected or outputs
        for output, want in zip(outputs, expected, strict=True):
            assert_same_bits(output, want)


def test_the_callers_arrays_are_free_after_the_sync() -> None:
    """The deferred part may still be running then; it must not see what the caller writes."""
    rng = np.random.default_rng(10)
    layer = draw_layer(rng, 16, 96, 160)
    batch = draw_batch(rng, layer, 20 if IS_SLOW else 1000, P)
    expected = carried(layer, batch, P).astype(bf16)
    (moe,) = wrappers([layer], [P])
    for _ in range(5):
        copies = Batch(*(array.copy() for array in batch))
        moe.submit_forward(*copies)
        moe.sync_forward()
        copies.x[...] = np.nan
        copies.weights[...] = np.nan
        copies.ids[...] = 0
        assert_same_bits(KTMoEWrapper.drain_deferred(), expected)


def test_the_capture_sizes_do_not_show() -> None:
    layers, batches = drawn(11, 3)
    expected = run_pass(wrappers(layers, [1, 2, 1]), batches)
    KTMoEWrapper.drain_deferred()
    KTMoEWrapper.set_capture_batch_sizes([1, T])
    try:
        for _ in range(2):
            outputs = run_pass(wrappers(layers, [1, 2, 1]), batches)
            KTMoEWrapper.drain_deferred()
            for output, want in zip(outputs, expected, strict=True):
                assert_same_bits(output, want)
            KTMoEWrapper.clear_buffer_cache()
    finally:
        KTMoEWrapper.set_capture_batch_sizes([])
        KExpertsCPUBuffer.clear_buffer_cache()


def test_clearing_the_buffers_in_the_middle_of_a_pass() -> None:
    layers, batches = drawn(12, 2)
    moes = wrappers(layers, [2, 2])
    expected = [*run_pass(moes, batches), KTMoEWrapper.drain_deferred()]
    first = np.empty((T, H), np.float32)
    moes[0].submit_forward(*batches[0], out=first)
    KTMoEWrapper.clear_buffer_cache()
    moes[0].sync_forward()
    KTMoEWrapper.clear_buffer_cache()
    second = moes[1].forward(*batches[1], out=np.empty((T, H), np.float32))
    KTMoEWrapper.clear_buffer_cache()
    for output, want in zip((first, second, KTMoEWrapper.drain_deferred()), expected, strict=True):
        assert_same_bits(output, want)


def test_another_engine() -> None:
    """What the buffers remember of the engine before must not matter."""
    script = """
        import numpy as np
        from layers import assert_same_bits, draw_batch, draw_layer
        from ktmoe_np import KTMoEWrapper
        from ktmoe_np.cpuinfer import _MoEBase

        layer = draw_layer(np.random.default_rng(0), 3, 16, 24)
        batch = draw_batch(np.random.default_rng(1), layer, 5, 2)
        results = []
        for num_threads in (1, 2):
            moe = layer.wrapper(2, max_deferred_experts_per_token=1, cpuinfer_threads=num_threads)
            for _ in range(3 if num_threads == 1 else 1):
                results.append((moe.forward(*batch), KTMoEWrapper.drain_deferred()))
            del moe
            _MoEBase.reset_cpu_infer()
        for output, remaining in results:
            assert_same_bits(output, results[0][0])
            assert_same_bits(remaining, results[0][1])
    """
    done = run_python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- what is refused ----


def undrained(num_tokens: int = T) -> tuple[list[Any], list[Batch], AnyArray]:
    """Two layers of which the first has deferred something, and what that is."""
    layers, batches = drawn(13, 2, num_tokens)
    moes = wrappers(layers, [2, 2])
    moes[0].forward(*batches[0])
    return moes, batches, carried(layers[0], batches[0], 2).astype(bf16)


@pytest.mark.parametrize("how", ["forward", "submit_forward"])
def test_a_pass_that_was_not_drained(how: str) -> None:
    moes, batches, remaining = undrained()
    message = r"layer 0: the deferred experts of layer 0 are left over from the pass before; call drain_def"
    with pytest.raises(RuntimeError, match=message):
        getattr(moes[0], how)(*batches[0])
    assert_same_bits(KTMoEWrapper.drain_deferred(), remaining)
    moes[0].forward(*batches[0])
    assert_same_bits(KTMoEWrapper.drain_deferred(), remaining)


@pytest.mark.parametrize("how", ["forward", "submit_forward"])
@pytest.mark.parametrize("num_tokens", [0, T - 1, T + 1])
def test_another_number_of_tokens(how: str, num_tokens: int) -> None:
    moes, batches, _ = undrained()
    other = draw_batch(np.random.default_rng(0), drawn(13, 2)[0][1], num_tokens, P)
    message = rf"hidden_states: got \[{num_tokens}, {H}\], expected \[{T}, {H}\] like the deferred output of"
    with pytest.raises(ValueError, match=message):
        getattr(moes[1], how)(*other)
    moes[1].forward(*batches[1])  # the deferred output still waits for it
    assert KTMoEWrapper.drain_deferred() is not None


def test_incremental_onto_a_deferred_output() -> None:
    moes, batches, remaining = undrained()
    out = np.full((T, H), 3.0, np.float32)
    with pytest.raises(
        ValueError, match="incremental: got True, but the output begins with the deferred experts"
    ):
        moes[1].forward(*batches[1], out=out, incremental=True)
    assert (out == 3.0).all()
    assert_same_bits(KTMoEWrapper.drain_deferred(), remaining)


def test_incremental_in_the_first_layer() -> None:
    layers, batches = drawn(14, 1)
    (moe,) = wrappers(layers, [2])
    base = draw(np.random.default_rng(0), T, H).astype(np.float32)
    out = moe.forward(*batches[0], out=base.copy(), incremental=True)
    assert_same_bits(out, alone(layers[0], parts(batches[0], 2)[0], base=base))


@pytest.mark.parametrize("how", ["forward", "submit_forward"])
def test_wrong_arguments_leave_what_remains(how: str) -> None:
    moes, batches, remaining = undrained()
    x, ids, weights = batches[1]
    too_large = ids.copy()
    too_large[3, 1] = E
    out = np.full((T, H), 3.0, np.float32)
    for arguments, error, message in (
        ((x, too_large, weights), IndexError, rf"topk_ids: got expert {E}.*, expected ids below {E}"),
        (
            (x, ids, weights[:-1]),
            ValueError,
            rf"topk_weights: got .*\[{T - 1}, {P}\], expected .*\[{T}, {P}\]",
        ),
        ((x, ids[:-1], weights), ValueError, rf"topk_ids: got .*\[{T - 1}, {P}\], expected .*\[{T}, {P}\]"),
        ((x, ids, weights.astype(np.int64)), TypeError, r"topk_weights: got int64"),
        ((x.astype(np.float64), ids, weights), TypeError, r"hidden_states: got float64"),
    ):
        with pytest.raises(error, match=message):
            getattr(moes[1], how)(*arguments, out=out)
    assert (out == 3.0).all()
    assert_same_bits(KTMoEWrapper.drain_deferred(), remaining)


def test_a_wrong_id_in_a_layer_that_defers_nothing() -> None:
    """The sum that it should have begun with is not lost."""
    _, batches, remaining = undrained()
    last = drawn(13, 2)[0][1].wrapper(P, layer_idx=1)
    ids = batches[1].ids.copy()
    ids[0, 0] = E
    with pytest.raises(IndexError, match=f"topk_ids: got expert {E}"):
        last.forward(batches[1].x, ids, batches[1].weights)
    assert_same_bits(KTMoEWrapper.drain_deferred(), remaining)


def test_sync_before_submit_and_submit_twice() -> None:
    layers, batches = drawn(15, 1)
    (moe,) = wrappers(layers, [1])
    with pytest.raises(RuntimeError, match="sync_forward: no pass of layer 0 is pending"):
        moe.sync_forward()
    moe.submit_forward(*batches[0])
    with pytest.raises(RuntimeError, match="submit_forward: a pass of layer 0 is pending"):
        moe.submit_forward(*batches[0])
    moe.sync_forward()


def test_nothing_to_drain() -> None:
    assert KTMoEWrapper.drain_deferred() is None
    layers, batches = drawn(16, 1)
    layers[0].forward(batches[0])
    assert KTMoEWrapper.drain_deferred() is None
