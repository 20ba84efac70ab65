"""Rows of experts that are summed apart: are they what a layer sums itself, to the bit?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import ACTIVATIONS, AnyArray, Batch, assert_same_bits, bf16, draw_batch
from native_layers import METHODS as NATIVE_METHODS
from quantized_layers import METHODS as QUANTIZED_METHODS
from sft_layers import SIZES, Method, Student, draw_student, draw_training

from ktmoe_np import kt_kernel_ext as ext

pytestmark = [pytest.mark.kernels, pytest.mark.asan]

E, I, H, P, T = 4, 33, 64, 2, 9  # noqa: E741

METHODS: list[Method] = [
    *((f"{name}_SFT", None) for name in NATIVE_METHODS),
    *((f"{name}_SFT", size) for name, size in QUANTIZED_METHODS),
]


def row_numbers(ids: AnyArray) -> tuple[AnyArray, int]:
    """The row of each slot, in the order of slots, and how many there are."""
    valid = ids >= 0
    return np.where(valid, np.cumsum(valid).reshape(ids.shape) - 1, -1).astype(np.int32), int(valid.sum())


def combined(
    moe: Any, rows: AnyArray, index: AnyArray, weights: Any, x: AnyArray, dtype: Any = bf16
) -> AnyArray:
    out = np.empty(x.shape, dtype)
    engine = moe.cpu_infer
    engine.run(ext.moe.combine_rows_task(engine.backend_, rows, index, weights, x, out))
    return out


def forward_in_two(moe: Any, batch: Batch, dtype: Any = bf16) -> AnyArray:
    """A pass whose rows are moved before they are summed."""
    index, count = row_numbers(batch.ids)
    rows = np.full((count, batch.x.shape[1]), np.nan, np.float32)
    moe.cpu_infer.run(moe._layer.expert_rows_task(*batch, rows))
    order = np.random.default_rng(count).permutation(count)
    moved = np.empty_like(rows)
    moved[order] = rows
    index = np.where(index < 0, -1, order[index] if count else -1).astype(np.int32)
    weights = None if moe.config.scale_inputs else batch.weights
    return combined(moe, moved, index, weights, batch.x, dtype)


@given(st.data(), st.integers(0, 2**32 - 1))
def test_inference(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = (data.draw(st.integers(1, 5)), *(data.draw(st.sampled_from(SIZES)) for _ in range(2)))
    student = draw_student(
        rng, sizes, 0, data.draw(st.sampled_from(ACTIVATIONS)), with_biases=data.draw(st.booleans())
    )
    slots = data.draw(st.integers(1, 3))
    moe = student.layer.wrapper(slots)
    batch, _ = draw_training(rng, student, data.draw(st.sampled_from([0, 1, 2, 9, 40])), slots)
    dtype = data.draw(st.sampled_from([bf16, np.dtype(np.float32)]))
    expected = moe.forward(*batch, out=np.empty(batch.x.shape, dtype))
    assert_same_bits(forward_in_two(moe, batch, dtype), expected)


def moe_of(student: Student, **options: Any) -> Any:
    method, group_size = student.method
    name = "BF16" if method == "AMXBF16_SFT" else method.removesuffix("_SFT")
    return student.layer.wrapper(P, method=name, group_size=group_size, **options)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method(method: Method) -> None:
    rng = np.random.default_rng(0)
    student = draw_student(rng, (E, I, H), 0, method=method)
    batch, _ = draw_training(rng, student, 30, P)
    moe = moe_of(student)
    assert_same_bits(forward_in_two(moe, batch), moe.forward(*batch))


@pytest.mark.parametrize("method", [("AMXBF16_SFT", None), ("AMXINT8_SFT", None)], ids=str)
def test_tokens_that_are_not_finite(method: Method) -> None:
    rng = np.random.default_rng(1)
    student = draw_student(rng, (E, I, H), 0, method=method)
    batch, _ = draw_training(rng, student, T, P)
    batch.x[2, 5], batch.x[4, 0] = np.inf, np.nan
    batch.ids[4] = -1
    moe = moe_of(student)
    expected = moe.forward(*batch)
    assert np.isnan(expected[2].astype(np.float32)).all()
    assert not np.isnan(np.delete(expected, 2, axis=0).astype(np.float32)).any()
    assert_same_bits(forward_in_two(moe, batch), expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale_inputs", [False, True])
def test_training(scale_inputs: bool, recompute: bool) -> None:
    rng = np.random.default_rng(2)
    student = draw_student(rng, (E, I, H), 5)
    student = replace(student, layer=replace(student.layer, scale_inputs=scale_inputs))
    batch, grad = draw_training(rng, student, 20, P)
    whole, parts = student.wrapper(P, recompute=recompute), student.wrapper(P, recompute=recompute)
    expected, gradients = whole.forward_sft(*batch), whole.backward(grad)

    index, count = row_numbers(batch.ids)
    rows, grad_rows = np.empty((count, H), np.float32), np.empty((count, H), np.float32)
    layer, engine = parts._layer, parts.cpu_infer
    engine.run(layer.forward_sft_task(*batch, rows, True, expert_rows=True))
    assert_same_bits(combined(parts, rows, index, None if scale_inputs else batch.weights, batch.x), expected)
    grad_weights = np.empty((20, P), np.float32)
    matrices = {name: np.empty_like(value) for name, value in gradients.matrices.items()}
    engine.run(layer.backward_task(grad, grad_rows, grad_weights, **matrices, expert_rows=True))
    weights = batch.weights if scale_inputs else None
    assert_same_bits(combined(parts, grad_rows, index, weights, batch.x), gradients.grad_input)
    assert_same_bits(grad_weights, gradients.grad_weights)
    for name, value in matrices.items():
        assert_same_bits(value, gradients.matrices[name], name)


def test_another_number_of_rows() -> None:
    rng = np.random.default_rng(3)
    student = draw_student(rng, (E, I, H), 2)
    batch = draw_batch(rng, student.layer, T, P)
    moe, trained = student.layer.wrapper(P), student.wrapper(P)
    message = f"expert_rows: got {T * P - 1} rows, expected {T * P}, one for each slot that is not skipped"
    short = np.empty((T * P - 1, H), np.float32)
    with pytest.raises(ValueError, match=message):
        moe.cpu_infer.run(moe._layer.expert_rows_task(*batch, short))
    with pytest.raises(ValueError, match=message):
        trained.cpu_infer.run(trained._layer.forward_sft_task(*batch, short, True, expert_rows=True))
    assert trained.num_cached == 0
    trained.forward_sft(*batch)
    task = trained._layer.backward_task(batch.x, short, np.empty((T, P), np.float32), expert_rows=True)
    with pytest.raises(ValueError, match=message):
        trained.cpu_infer.run(task)
    assert trained.num_cached == 1


def sum_arguments() -> dict[str, Any]:
    return {
        "rows": np.zeros((3, H), np.float32),
        "row": np.zeros((T, P), np.int32),
        "weights": np.zeros((T, P), np.float32),
        "hidden_states": np.zeros((T, H), bf16),
        "out": np.zeros((T, H), bf16),
    }


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("rows", np.zeros((3, H)), TypeError, "rows: got float64"),
        ("rows", np.zeros((H,), np.float32), ValueError, "rows: got float32"),
        ("row", np.zeros((T, P)), TypeError, "row: got float64"),
        (
            "row",
            np.full((T, P), 3, np.int32),
            IndexError,
            "row: got 3 at 0, expected below 3, the number of rows",
        ),
        ("weights", np.zeros((T, P + 1), np.float32), ValueError, "weights: got float32"),
        ("hidden_states", np.zeros((T + 1, H), bf16), ValueError, "hidden_states: got bfloat16"),
        ("out", np.zeros((T, H), np.float16), TypeError, "out: got float16"),
        ("out", None, TypeError, "out"),
    ],
    ids=str,
)
def test_wrong_sums(name: str, value: Any, error: type[Exception], message: str) -> None:
    moe = draw_student(np.random.default_rng(0), (E, I, H), 0).layer.wrapper(P)
    arguments = {**sum_arguments(), name: value}
    with pytest.raises(error, match=message):
        ext.moe.combine_rows_task(moe.cpu_infer.backend_, **arguments)


def test_overlapping_sums() -> None:
    moe = draw_student(np.random.default_rng(0), (E, I, H), 0).layer.wrapper(P)
    memory = np.zeros((T, H), bf16)
    with pytest.raises(ValueError, match="out"):
        ext.moe.combine_rows_task(
            moe.cpu_infer.backend_, **{**sum_arguments(), "hidden_states": memory, "out": memory}
        )
