"""Experts on several ranks: have results the bits of one process, and do all ranks learn of an error?"""

from __future__ import annotations

import doctest
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from int8_layers import draw_int8_layer
from layers import (
    ACTIVATIONS,
    AnyArray,
    Batch,
    Layer,
    assert_close,
    assert_same_bits,
    bf16,
    draw,
    draw_batch,
    draw_layer,
)
from native_layers import METHODS as NATIVE_METHODS
from quantized_layers import METHODS as QUANTIZED_METHODS
from ranks import draw_placement, experts_of, on_ranks, picked
from sft_layers import SIZES, draw_student

import ktmoe_np.distributed.exchange
import ktmoe_np.distributed.expert_parallel
from ktmoe_np import KTMoEWrapper
from ktmoe_np.distributed import ExpertParallel, RankError
from ktmoe_np.models import EMBEDDED_MODEL

E, I, H, P = 5, 33, 64, 2  # noqa: E741


@pytest.mark.parametrize("name", ["exchange", "expert_parallel"])
def test_doctests(name: str) -> None:
    assert doctest.testmod(getattr(ktmoe_np.distributed, name)).failed == 0


def draw_batches(rng: np.random.Generator, layer: Layer, sizes: list[int], slots: int) -> list[Batch]:
    """A batch for each rank, with ids that are skipped."""
    batches = []
    for size in sizes:
        x, ids, weights = draw_batch(rng, layer, size, slots)
        batches.append(Batch(x, np.where(rng.random(ids.shape) < 0.1, -1, ids), weights))
    return batches


def layer_on(
    comm: Any, layer: Layer, slots: int, placement: Any = "contiguous", **options: Any
) -> ExpertParallel:
    """The rank's part of a layer; options are of the wrapper but for those of `ExpertParallel`."""
    own = {name: options.pop(name) for name in ("combine", "slice_tokens", "timeout") if name in options}
    mine = picked(layer, experts_of(placement, layer.num_experts, comm))
    return ExpertParallel(
        mine.wrapper(slots, **options), comm, placement=placement, **{"timeout": 30.0, **own}
    )


def forward_on_ranks(
    layer: Layer, batches: list[Batch], dtype: Any = bf16, calls: int = 1, **options: Any
) -> list[AnyArray]:
    """What each rank gets for its batch."""

    def rank(comm: Any) -> AnyArray:
        moe, batch = layer_on(comm, layer, batches[0].ids.shape[1], **options), batches[comm.rank]
        for _ in range(calls):
            out = moe.forward(*batch, out=np.empty(batch.x.shape, dtype))
        return out

    return on_ranks(len(batches), rank)


@given(st.data(), st.integers(0, 2**32 - 1))
def test_bits_of_one_process(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_ranks = data.draw(st.integers(1, 4))
    num_experts = data.draw(st.integers(num_ranks, 9))
    inter, hidden = (data.draw(st.sampled_from(SIZES)) for _ in range(2))
    layer = draw_layer(
        rng,
        num_experts,
        inter,
        hidden,
        data.draw(st.sampled_from(ACTIVATIONS)),
        with_biases=data.draw(st.booleans()),
    )
    layer = replace(layer, scale_inputs=data.draw(st.booleans()))
    slots = data.draw(st.integers(1, 3))
    sizes = [data.draw(st.sampled_from([0, 1, 2, 5, 23])) for _ in range(num_ranks)]
    batches = draw_batches(rng, layer, sizes, slots)
    dtype = data.draw(st.sampled_from([bf16, np.dtype(np.float32)]))
    found = forward_on_ranks(
        layer,
        batches,
        dtype,
        placement=data.draw(draw_placement(num_experts, num_ranks)),
        slice_tokens=data.draw(st.sampled_from([1, 2, 7, 2048])),
        chunked_prefill_size=data.draw(st.sampled_from([3, 4096])),
    )
    for rank, (batch, got) in enumerate(zip(batches, found, strict=True)):
        expected = layer.forward(batch, out=np.empty(batch.x.shape, dtype))
        assert_same_bits(got, expected, f"rank {rank}")


METHODS = [*((name, None) for name in NATIVE_METHODS), *QUANTIZED_METHODS]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method(method: tuple[str, int | None]) -> None:
    rng = np.random.default_rng(0)
    name, group_size = method
    layer = draw_student(rng, (E, I, H), 0, method=(f"{name}_SFT", group_size)).layer
    batches = draw_batches(rng, layer, [9, 4, 0], P)
    options = {"method": "BF16" if name == "AMXBF16" else name, "group_size": group_size}
    found = forward_on_ranks(layer, batches, placement=[2, 0, 1, 0, 2], slice_tokens=4, calls=2, **options)
    moe = layer.wrapper(P, **options)
    for batch, got in zip(batches, found, strict=True):
        assert_same_bits(got, moe.forward(*batch))


@pytest.mark.parametrize("method", ["RAWINT4", "LLAMAFILE"])
def test_int8_activations(method: str) -> None:
    rng = np.random.default_rng(1)
    drawn = draw_int8_layer(rng, (method, None), (E, 40, 70))
    batches = draw_batches(rng, drawn.layer, [3, 8], P)

    def rank(comm: Any) -> AnyArray:
        moe = layer_on(comm, drawn.layer, P, method=method)
        out: AnyArray = moe.forward(*batches[comm.rank], activation_dtype="int8")
        return out

    moe = drawn.wrapper(P)
    for batch, got in zip(batches, on_ranks(2, rank), strict=True):
        assert_same_bits(got, moe.forward(*batch, activation_dtype="int8"))


def test_tokens_that_are_not_finite() -> None:
    rng = np.random.default_rng(2)
    layer = draw_layer(rng, E, I, H)
    batches = draw_batches(rng, layer, [6, 6], P)
    batches[0].x[3, 7], batches[1].x[0, 0] = np.nan, -np.inf
    for batch, got in zip(batches, forward_on_ranks(layer, batches), strict=True):
        assert_same_bits(got, layer.forward(batch))


@pytest.mark.parametrize("scale_inputs", [False, True])
@pytest.mark.parametrize("slice_tokens", [5, 2048])
def test_fast_sums(scale_inputs: bool, slice_tokens: int) -> None:
    rng = np.random.default_rng(3)
    layer = replace(draw_layer(rng, E, I, H), scale_inputs=scale_inputs)
    batches = draw_batches(rng, layer, [20, 0, 13], 3)
    found = forward_on_ranks(
        layer, batches, np.float32, combine="fast", placement="strided", slice_tokens=slice_tokens
    )
    exact = [layer.forward(batch, out=np.empty(batch.x.shape, np.float32)) for batch in batches]
    for batch, got in zip(batches, found, strict=True):
        assert_close(got, layer, batch)
    assert any((got != one).any() for got, one in zip(found, exact, strict=True))  # it is not exact's sum


def test_leading_axes_and_new_arrays() -> None:
    rng = np.random.default_rng(4)
    layer = draw_layer(rng, E, I, H)
    (x, ids, weights), other = draw_batches(rng, layer, [6, 1], P)

    def rank(comm: Any) -> AnyArray:
        moe = layer_on(comm, layer, P)
        if comm.rank == 1:
            return moe.forward(*other)
        shaped = (
            x.reshape(2, 3, H).astype(np.float32),
            ids.reshape(2, 3, P).tolist(),
            weights.reshape(2, 3, P),
        )
        return moe.forward(*shaped)

    got, _ = on_ranks(2, rank)
    assert_same_bits(got.reshape(6, H), layer.forward(Batch(x, ids, weights)).astype(got.dtype))


def test_no_tokens_anywhere() -> None:
    layer = draw_layer(np.random.default_rng(5), E, I, H)
    batches = draw_batches(np.random.default_rng(5), layer, [0, 0], P)
    assert [got.shape for got in forward_on_ranks(layer, batches)] == [(0, H), (0, H)]


def test_several_layers_and_what_they_say() -> None:
    rng = np.random.default_rng(6)
    layers = [draw_layer(rng, E, I, H) for _ in range(2)]
    batches = draw_batches(rng, layers[0], [4, 3], P)

    def rank(comm: Any) -> tuple[list[AnyArray], Any]:
        moes = [layer_on(comm, layer, P, "strided", layer_idx=i) for i, layer in enumerate(layers)]
        return [moe.forward(*batches[comm.rank]) for moe in moes], moes[1]

    for number, (found, moe) in enumerate(on_ranks(2, rank)):
        for got, layer in zip(found, layers, strict=True):
            assert_same_bits(got, layer.forward(batches[number]))
        assert (moe.rank, moe.size, moe.layer_idx, moe.combine) == (number, 2, 1, "exact")
        assert moe.experts.tolist() == [[0, 2, 4], [1, 3]][number]
        assert moe.config.num_experts == E
        assert moe.placement.owners.tolist() == [0, 1, 0, 1, 0]
        assert repr(moe).startswith(
            f"<ExpertParallel rank {number} of 2 with {len(moe.experts)} experts of 5"
        )


# ---- errors ----


def caught(function: Any) -> str:
    """The message of an error that all ranks raise."""
    with pytest.raises(RankError) as found:
        function()
    return str(found.value)


def test_wrong_arguments_of_one_rank() -> None:
    rng = np.random.default_rng(7)
    layer = draw_layer(rng, E, I, H)
    batches = draw_batches(rng, layer, [4, 3, 2], P)
    wrong = batches[1].ids.copy()
    wrong[2, 1] = E

    def rank(comm: Any) -> tuple[list[str], AnyArray]:
        moe, (x, ids, weights) = layer_on(comm, layer, P), batches[comm.rank]
        second = comm.rank == 1
        said = [
            caught(lambda: moe.forward(x, wrong if second else ids, weights)),
            caught(lambda: moe.forward(x[:, 1:] if second else x, ids, weights)),
            caught(lambda: moe.forward(x, ids, weights, activation_dtype="int8" if second else None)),
            caught(lambda: moe.forward(x, ids, weights, out=x if comm.rank != 1 else None)),
        ]
        return said, moe.forward(x, ids, weights)

    for number, (said, got) in enumerate(on_ranks(3, rank)):
        assert said[0] == (
            f"rank 1: IndexError: topk_ids: got expert {E} at [2, 1], expected ids below {E} "
            "(negative ids are skipped)"
        )
        assert said[1].startswith("rank 1: ValueError: hidden_states: got bfloat16 [3, 63], expected")
        assert said[2].startswith("rank 1: ValueError: activation_dtype: got int8, expected bfloat16")
        assert said[3].startswith("rank 0: ")
        assert "; rank 2: " in said[3]
        assert_same_bits(got, layer.forward(batches[number]))


def test_an_error_while_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    layer = draw_layer(rng, E, I, H)
    batches = draw_batches(rng, layer, [9, 7], P)

    def rank(comm: Any) -> tuple[str, AnyArray]:
        moe, batch = layer_on(comm, layer, P, slice_tokens=3), batches[comm.rank]
        real = moe.layer._layer

        class Failing:
            def expert_rows_task(self, x: Any, ids: Any, weights: Any, rows: Any, **_: Any) -> Any:
                return real.expert_rows_task(x, ids, weights, rows[:-1] if len(rows) else rows)

        if comm.rank == 1:
            moe.layer._layer = Failing()  # type: ignore[assignment]
        said = caught(lambda: moe.forward(*batch))
        moe.layer._layer = real
        return said, moe.forward(*batch)

    for number, (said, got) in enumerate(on_ranks(2, rank)):
        assert said.startswith("rank 1: ValueError: expert_rows: got")
        assert_same_bits(got, layer.forward(batches[number]))


def test_different_calls() -> None:
    rng = np.random.default_rng(9)
    layer = draw_layer(rng, E, I, H)
    batches = draw_batches(rng, layer, [4, 3], P)

    def rank(comm: Any) -> tuple[str, str, AnyArray]:
        first, second = (layer_on(comm, layer, P, layer_idx=i) for i in range(2))
        batch = batches[comm.rank]
        said = caught(lambda: (first if comm.rank == 0 else second).forward(*batch))
        dtype = "bfloat16" if comm.rank == 0 else None
        other = caught(lambda: first.forward(*batch, activation_dtype=dtype))
        return said, other, first.forward(*batch)

    for number, (said, other, got) in enumerate(on_ranks(2, rank)):
        assert "rank 0 calls forward of layer 0" in said
        assert "rank 1 calls forward of layer 1" in said
        assert said.endswith("expected the same calls in the same order on all ranks")
        assert "forward of layer 0 (variant 1)" in other
        assert_same_bits(got, layer.forward(batches[number]))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"combine": "fast"}, "layer 0 on rank 1: got combine 'fast', expected 'exact' as on rank 0"),
        ({"slice_tokens": 7}, "layer 0 on rank 1: got slice_tokens 7, expected 2048 as on rank 0"),
        ({"method": "MOE_INT8"}, "got method 'MOE_INT8', expected 'BF16'"),
        ({"layer_idx": 3}, "got layer_idx '3', expected '0'"),
        ({"combine": "some"}, "rank 1: ValueError: combine: got 'some', expected 'exact' or 'fast'"),
        ({"slice_tokens": 0}, "rank 1: ValueError: slice_tokens: got 0, expected 1 or more"),
    ],
    ids=str,
)
def test_layers_that_differ(second: dict[str, Any], message: str) -> None:
    layer = draw_layer(np.random.default_rng(10), E, I, H)

    def rank(comm: Any) -> str:
        said = caught(lambda: layer_on(comm, layer, P, **(second if comm.rank == 1 else {})))
        layer_on(comm, layer, P)  # the communicator can still be used
        return said

    for said in on_ranks(2, rank):
        assert message in said


def test_placements_that_differ() -> None:
    layer = draw_layer(np.random.default_rng(10), 4, I, H)

    def rank(comm: Any) -> list[str]:
        moe = picked(layer, np.arange(2)).wrapper(P)
        other = "contiguous" if comm.rank else "strided"
        return [
            caught(lambda: ExpertParallel(moe, comm, placement=other)),
            caught(lambda: ExpertParallel(moe, comm, placement=[0, 0, 0, 1])),
            caught(lambda: ExpertParallel(moe, comm, placement=[0, 0, 1])),
            caught(lambda: ExpertParallel("layer" if comm.rank else moe, comm)),
            caught(lambda: ExpertParallel(KTMoEWrapper(0, 2, P, H, I), comm)),
        ]

    for said in on_ranks(2, rank):
        assert "got placement [0, 0, 1, 1], expected [0, 1, 0, 1] as on rank 0" in said[0]
        assert "placement: got 3 experts for rank 0, expected 2, those of its layer" in said[1]
        assert "placement: got shape [3], expected [4]" in said[2]
        assert "rank 1: TypeError: layer: got str, expected a BaseMoEWrapper" in said[3]
        assert "rank 0: RuntimeError: layer 0 has no weights yet" in said[4]


def test_layers_that_leave_experts_out() -> None:
    layer = draw_layer(np.random.default_rng(15), 4, I, H)
    (batch,) = draw_batches(np.random.default_rng(15), layer, [3], P)

    def rank(comm: Any) -> list[str]:
        mine = picked(layer, experts_of("contiguous", 4, comm))
        deferring = mine.wrapper(P, max_deferred_experts_per_token=1)
        moe = ExpertParallel(mine.wrapper(P), comm, timeout=30)
        said = [caught(lambda: ExpertParallel(deferring, comm))]
        moe.layer.set_gpu_experts_mask([True, False])
        said.append(caught(lambda: moe.forward(*batch)))
        return said

    for said in on_ranks(2, rank):
        assert "max_deferred_experts_per_token: got 1, expected 0 with experts on several ranks" in said[0]
        assert "gpu_experts_mask: got one, expected None with experts on several ranks" in said[1]


def test_a_rank_that_does_not_come() -> None:
    rng = np.random.default_rng(11)
    layer = draw_layer(rng, E, I, H)
    batches = draw_batches(rng, layer, [4, 3], P)

    def rank(comm: Any) -> float:
        moe = layer_on(comm, layer, P, timeout=0.3)
        if comm.rank == 1:
            return 0.0
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match=r"waited 0\.3 s for all ranks to begin forward of layer 0"):
            moe.forward(*batches[0])
        took = time.monotonic() - begin
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match="cannot be used any more: rank 0 was interrupted by Timeout"
            ):
                moe.forward(*batches[0])
        return took

    assert 0.3 <= on_ranks(2, rank)[0] < 5


def test_an_interrupt_leaves_a_channel_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = draw_layer(np.random.default_rng(12), E, I, H)
    (batch,) = draw_batches(np.random.default_rng(12), layer, [4], P)

    def rank(comm: Any) -> None:
        moe = layer_on(comm, layer, P)

        def interrupted(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr("ktmoe_np.distributed.expert_parallel.run_slices", interrupted)
        with pytest.raises(KeyboardInterrupt):
            moe.forward(*batch)
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="cannot be used any more: KeyboardInterrupt on rank 0"):
            moe.forward(*batch)

    on_ranks(1, rank)


def test_threads_of_one_rank() -> None:
    layer = draw_layer(np.random.default_rng(13), E, I, H)
    batches = draw_batches(np.random.default_rng(13), layer, [4, 4], P)
    entered, done = threading.Event(), threading.Event()

    def rank(comm: Any) -> AnyArray:
        moe = layer_on(comm, layer, P)
        if comm.rank == 1:
            done.wait(30)
            return moe.forward(*batches[1])
        other = threading.Thread(target=second, args=(moe,))
        other.start()
        entered.set()
        result: AnyArray = moe.forward(*batches[0])
        other.join()
        return result

    def second(moe: ExpertParallel) -> None:
        entered.wait(30)
        while not moe._channel._lock.locked():
            time.sleep(0.001)
        try:
            with pytest.raises(RuntimeError, match="another thread of this rank is in one"):
                moe.forward(*batches[0])
        finally:
            done.set()

    for got, batch in zip(on_ranks(2, rank), batches, strict=True):
        assert_same_bits(got, layer.forward(batch))


# ---- checkpoints ----


def test_layers_of_a_checkpoint() -> None:
    whole = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, 1)
    rng, config = np.random.default_rng(14), whole.config
    batches = [
        Batch(draw(rng, size, 256), rng.integers(0, 16, (size, 4)), rng.random((size, 4), np.float32))
        for size in (5, 3, 2)
    ]
    assert (config.num_experts, config.num_experts_per_tok) == (16, 4)

    def rank(comm: Any) -> tuple[AnyArray, Any]:
        moe = ExpertParallel.from_pretrained(EMBEDDED_MODEL, 1, comm=comm, placement="strided", timeout=30)
        return moe.forward(*batches[comm.rank]), moe

    for batch, (got, moe) in zip(batches, on_ranks(3, rank), strict=True):
        assert_same_bits(got, whole.forward(*batch))
        assert moe.config == config
        assert moe.layer.config.num_experts in (5, 6)


def test_checkpoints_that_one_rank_does_not_find(tmp_path: Path) -> None:
    def rank(comm: Any) -> str:
        path = tmp_path if comm.rank else EMBEDDED_MODEL
        said = caught(lambda: ExpertParallel.from_pretrained(path, 1, comm=comm, timeout=30))
        ExpertParallel.from_pretrained(EMBEDDED_MODEL, 1, comm=comm)
        return said

    for said in on_ranks(2, rank):
        assert said.startswith("rank 1: FileNotFoundError")
