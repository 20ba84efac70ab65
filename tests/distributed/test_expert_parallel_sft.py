"""Training with experts on several ranks: are all gradients those of one process, to the bit?"""

from __future__ import annotations

import doctest
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import ACTIVATIONS, AnyArray, Batch, assert_same_bits, draw, draw_batch
from native_layers import METHODS as NATIVE_METHODS
from quantized_layers import METHODS as QUANTIZED_METHODS
from ranks import draw_placement, experts_of, on_ranks, picked
from sft_layers import SIZES, Method, Student, draw_student

import ktmoe_np.distributed.expert_parallel_sft
from ktmoe_np import SFTGradients
from ktmoe_np.distributed import ExpertParallel, ExpertParallelSFT, RankError

E, I, H, P, R = 5, 33, 64, 2, 3  # noqa: E741

METHODS: list[Method] = [
    *((f"{name}_SFT", None) for name in NATIVE_METHODS),
    *((f"{name}_SFT", size) for name, size in QUANTIZED_METHODS),
]


def test_doctests() -> None:
    assert doctest.testmod(ktmoe_np.distributed.expert_parallel_sft).failed == 0


def draw_steps(
    rng: np.random.Generator, student: Student, sizes: list[int], slots: int
) -> tuple[list[Batch], list[AnyArray]]:
    """A batch and a gradient of its output for each rank, with ids that are skipped."""
    batches = []
    for size in sizes:
        x, ids, weights = draw_batch(rng, student.layer, size, slots)
        batches.append(Batch(x, np.where(rng.random(ids.shape) < 0.1, -1, ids), weights))
    return batches, [draw(rng, size, student.layer.hidden_size) for size in sizes]


def part_on(
    comm: Any,
    student: Student,
    slots: int,
    placement: Any = "contiguous",
    timeout: float = 30.0,
    **options: Any,
) -> tuple[ExpertParallelSFT, AnyArray]:
    """The rank's part of a layer, and the ids of its experts."""
    mine = experts_of(placement, student.layer.num_experts, comm)
    lora = {name: value[mine] for name, value in student.lora.items()}
    part = replace(student, layer=picked(student.layer, mine), lora=lora)
    return ExpertParallelSFT(part.wrapper(slots, **options), comm, placement=placement, timeout=timeout), mine


def assert_bits_of_one_process(
    student: Student,
    batches: list[Batch],
    grads: list[AnyArray],
    placement: Any = "contiguous",
    **options: Any,
) -> None:
    """Two steps, the second into the first one's arrays, on the ranks and in one process."""
    slots = batches[0].ids.shape[1]
    whole = student.wrapper(slots, **options)
    everything = Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))
    expected, gradients = whole.forward_sft(*everything), whole.backward(np.concatenate(grads))
    twice = SFTGradients(gradients.grad_input, gradients.grad_weights, **gradients.matrices)
    once = {name: value.copy() for name, value in gradients.matrices.items()}
    whole.forward_sft(*everything)
    whole.backward(np.concatenate(grads), gradients=twice, accumulate=True)

    def rank(comm: Any) -> Any:
        part, mine = part_on(comm, student, slots, placement, **options)
        out = part.forward_sft(*batches[comm.rank])
        assert part.num_cached == 1
        found = part.backward(grads[comm.rank])
        assert part.num_cached == 0
        first = {name: value.copy() for name, value in found.matrices.items()}
        part.forward_sft(*batches[comm.rank])
        again = SFTGradients(found.grad_input, found.grad_weights, **found.matrices)
        part.backward(grads[comm.rank], gradients=again, accumulate=True)
        return mine, out, found, first

    begin = 0
    for number, (mine, out, found, first) in enumerate(on_ranks(len(batches), rank)):
        rows = slice(begin, begin := begin + len(batches[number].x))
        assert_same_bits(out, expected[rows], f"rank {number}")
        assert_same_bits(found.grad_input, gradients.grad_input[rows], f"rank {number}")
        assert_same_bits(found.grad_weights, gradients.grad_weights[rows], f"rank {number}")
        assert first.keys() == once.keys()
        for name, value in first.items():
            assert_same_bits(value, once[name][mine], f"{name} on rank {number}")
            assert_same_bits(
                found.matrices[name], twice.matrices[name][mine], f"{name} added on rank {number}"
            )


@given(st.data(), st.integers(0, 2**32 - 1))
def test_bits_of_one_process(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_ranks = data.draw(st.integers(1, 4))
    num_experts = data.draw(st.integers(num_ranks, 7))
    inter, hidden = (data.draw(st.sampled_from(SIZES)) for _ in range(2))
    activation, rank = data.draw(st.sampled_from(ACTIVATIONS)), data.draw(st.sampled_from([0, 1, 3, 16]))
    student = draw_student(
        rng, (num_experts, inter, hidden), rank, activation, with_biases=data.draw(st.booleans())
    )
    student = replace(student, layer=replace(student.layer, scale_inputs=data.draw(st.booleans())))
    sizes = [data.draw(st.sampled_from([0, 1, 2, 5, 23])) for _ in range(num_ranks)]
    batches, grads = draw_steps(rng, student, sizes, data.draw(st.integers(1, 3)))
    assert_bits_of_one_process(
        student,
        batches,
        grads,
        data.draw(draw_placement(num_experts, num_ranks)),
        recompute=data.draw(st.booleans()),
    )


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method(method: Method) -> None:
    rng = np.random.default_rng(0)
    student = draw_student(rng, (E, I, H), R, method=method)
    assert_bits_of_one_process(student, *draw_steps(rng, student, [9, 4, 0], P), [2, 0, 1, 0, 2])


def test_many_rows_of_an_expert() -> None:
    rng = np.random.default_rng(1)
    student = draw_student(rng, (3, I, H), R)
    assert_bits_of_one_process(student, *draw_steps(rng, student, [300, 150, 10], P))


def test_tokens_that_are_not_finite() -> None:
    rng = np.random.default_rng(2)
    student = draw_student(rng, (E, I, H), 0)
    batches, grads = draw_steps(rng, student, [4, 3], P)
    batches[1].x[1, 0] = np.inf
    assert_bits_of_one_process(student, batches, grads)


def test_skip_lora() -> None:
    rng = np.random.default_rng(3)
    student = draw_student(rng, (E, I, H), 0, method=("AMXBF16_SFT_SkipLoRA", None))
    assert_bits_of_one_process(student, *draw_steps(rng, student, [6, 3], P))


def test_adapters_are_drawn_as_by_one_process() -> None:
    student = replace(draw_student(np.random.default_rng(4), (E, I, H), R), lora={})
    whole = student.layer.wrapper(P, mode="sft", method="AMXBF16_SFT", lora_rank=R, seed=7)

    def rank(comm: Any) -> Any:
        mine = experts_of("strided", E, comm)
        layer = picked(student.layer, mine).wrapper(P, mode="sft", method="AMXBF16_SFT", lora_rank=R, seed=7)
        part = ExpertParallelSFT(layer, comm, placement="strided")
        first = dict(part.lora_weights)
        ones = np.ones((len(mine), R, H), np.float32)
        part.update_lora_weights(gate_lora_a=ones)
        changed = part.lora_weights["gate_lora_a"].copy()
        part.init_lora_weights(gate_lora_b=np.ones((len(mine), I, R), np.float32))
        return mine, first, changed, part.lora_weights

    for mine, first, changed, after in on_ranks(2, rank):
        for name, value in whole.lora_weights.items():
            assert_same_bits(first[name], value[mine], name)
        assert (changed == 1).all()
        assert_same_bits(after["gate_lora_a"], whole.lora_weights["gate_lora_a"][mine])
        assert (after["gate_lora_b"] == 1).all()


def test_forward_without_saving() -> None:
    rng = np.random.default_rng(5)
    student = draw_student(rng, (E, I, H), R)
    batches, _ = draw_steps(rng, student, [4, 3], P)

    def rank(comm: Any) -> AnyArray:
        part, _ = part_on(comm, student, P)
        out = np.empty(batches[comm.rank].x.shape, np.float32)
        assert part.forward_sft(*batches[comm.rank], save_for_backward=False, out=out) is out
        assert part.num_cached == 0
        return out

    whole = student.wrapper(P)
    for batch, got in zip(batches, on_ranks(2, rank), strict=True):
        assert_same_bits(got, whole.forward(*batch, out=np.empty(batch.x.shape, np.float32)))


# ---- errors ----


def caught(function: Any) -> str:
    with pytest.raises(RankError) as found:
        function()
    return str(found.value)


def test_wrong_calls() -> None:
    rng = np.random.default_rng(6)
    student = draw_student(rng, (E, I, H), R)
    batches, grads = draw_steps(rng, student, [4, 3], P)

    def rank(comm: Any) -> list[str]:
        part, _ = part_on(comm, student, P, max_cache_depth=1)
        (x, ids, weights), grad = batches[comm.rank], grads[comm.rank]
        second = comm.rank == 1
        said = [
            caught(lambda: part.backward(grad)),
            caught(lambda: part.forward_sft(x, ids + (E if second else 0), weights)),
            caught(lambda: part.forward_sft(x, ids, weights, save_for_backward=second)),
            caught(lambda: part.forward_sft(x, ids, weights, out=x if second else None)),
        ]
        assert part.num_cached == 0
        part.forward_sft(x, ids, weights)
        said += [
            caught(lambda: part.forward_sft(x, ids, weights)),
            caught(lambda: part.backward(grad[1:] if second else grad)),
            caught(lambda: part.backward(grad, accumulate=second)),
        ]
        assert part.num_cached == 1
        part.backward(grad)
        part.forward_sft(x, ids, weights)
        part.clear_cache()
        assert (part.num_cached, part.layer.num_cached) == (0, 0)
        return said

    for said in on_ranks(2, rank):
        assert "rank 0: RuntimeError: backward: got no saved forward pass of layer 0" in said[0]
        assert said[1].startswith("rank 1: IndexError: topk_ids: got expert")
        assert "rank 0 calls forward_sft of layer 0" in said[2]
        assert "rank 1 calls forward_sft of layer 0 (variant 1)" in said[2]
        assert said[3].startswith("rank 1: ValueError: out: its memory overlaps")
        assert "got 1 saved forward passes of layer 0, expected fewer than max_cache_depth 1" in said[4]
        assert said[5].startswith(
            "rank 1: ValueError: grad_output: got 2 tokens, expected 3 as in the forward"
        )
        assert said[6].startswith("rank 1: ValueError: gradients: got None with accumulate=True")


def test_an_error_of_one_rank_leaves_nothing_saved() -> None:
    """Neither on the rank that failed nor on the others; and the next step has the bits of one process."""
    rng = np.random.default_rng(7)
    student = draw_student(rng, (E, I, H), R)
    batches, grads = draw_steps(rng, student, [5, 6], P)
    whole = student.wrapper(P)
    expected = whole.forward_sft(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))
    gradients = whole.backward(np.concatenate(grads))

    def rank(comm: Any) -> Any:
        part, mine = part_on(comm, student, P)
        real = part.layer._layer

        class Failing:
            def forward_sft_task(
                self, x: Any, ids: Any, weights: Any, rows: Any, *rest: Any, **named: Any
            ) -> Any:
                return real.forward_sft_task(x, ids, weights, rows[:-1], *rest, **named)

            def backward_task(self, grad: Any, rows: Any, *rest: Any, **named: Any) -> Any:
                return real.backward_task(grad, rows[:-1], *rest, **named)

        part.layer._layer = Failing() if comm.rank == 1 else real  # type: ignore[assignment]
        said = [caught(lambda: part.forward_sft(*batches[comm.rank]))]
        part.layer._layer = real
        assert (part.num_cached, part.layer.num_cached) == (0, 0)
        out = part.forward_sft(*batches[comm.rank])
        part.layer._layer = Failing() if comm.rank == 1 else real  # type: ignore[assignment]
        said.append(caught(lambda: part.backward(grads[comm.rank])))
        part.layer._layer = real
        assert (part.num_cached, part.layer.num_cached) == (1, 1)
        return said, out, part.backward(grads[comm.rank]), mine

    found = on_ranks(2, rank)
    for said, _, _, _ in found:
        assert all(text.startswith("rank 1: ValueError: expert_rows: got") for text in said)
    assert_same_bits(np.concatenate([out for _, out, _, _ in found]), expected)
    for _, _, got, mine in found:
        for name, value in got.matrices.items():
            assert_same_bits(value, gradients.matrices[name][mine], name)


def test_layers_that_cannot_train_here() -> None:
    student = draw_student(np.random.default_rng(8), (4, I, H), R)
    inference = picked(student.layer, np.arange(2)).wrapper(P)

    def rank(comm: Any) -> list[str]:
        mine = experts_of("contiguous", 4, comm)
        layer = picked(student.layer, mine)
        options: dict[str, Any] = {"mode": "sft", "method": "AMXBF16_SFT", "lora_rank": R}
        saved = layer.wrapper(P, **options)
        saved.forward_sft(*draw_batch(np.random.default_rng(0), layer, 2, P))
        other_rank = {**options, "lora_rank": R + comm.rank}
        return [
            caught(lambda: ExpertParallelSFT(layer.wrapper(P, lora_dropout=0.1, **options), comm)),
            caught(lambda: ExpertParallelSFT(saved, comm)),
            caught(lambda: ExpertParallelSFT(inference, comm)),
            caught(lambda: ExpertParallel(saved, comm)),
            caught(lambda: ExpertParallelSFT(layer.wrapper(P, **other_rank), comm)),
        ]

    for said in on_ranks(2, rank):
        assert (
            "rank 0: ValueError: lora_dropout: got 0.1, expected 0 with experts on several ranks" in said[0]
        )
        assert "rank 0: ValueError: layer: got one with 1 saved passes, expected none" in said[1]
        assert "rank 0: TypeError: layer: got NativeMoEWrapper, expected a BaseSFTMoEWrapper" in said[2]
        assert "rank 0: TypeError: layer: got NativeSFTMoEWrapper, expected a BaseMoEWrapper" in said[3]
        assert "layer 4 on rank 1: got options" in said[4]
