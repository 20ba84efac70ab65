"""Steps of training on arrays of every kind, with any leading axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from array_kinds import KINDS, kind_of, numpy_of, of_jax, of_torch
from layers import assert_same_bits, bf16
from sft_layers import Student, draw_student, draw_training

from ktmoe_np import SFTGradients

E, I, H, R, P, T = 3, 45, 70, 4, 2, 6  # noqa: E741

OTHERS = [pytest.param(name, marks=pytest.mark.crosscheck) for name in KINDS if name != "NumPy"]


@pytest.fixture(scope="module")
def student() -> Student:
    return draw_student(np.random.default_rng(1), (E, I, H), R)


def drawn(student: Student) -> tuple[list[Any], Any]:
    batch, grad_output = draw_training(np.random.default_rng(2), student, T, P)
    return list(batch), grad_output


def each_result(gradients: SFTGradients) -> dict[str, Any]:
    return {
        "grad_input": gradients.grad_input,
        "grad_weights": gradients.grad_weights,
        **gradients.matrices,
    }


@pytest.mark.parametrize("kind", ["NumPy", *OTHERS])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("submit", [False, True])
def test_a_step_has_the_kind_of_its_arguments(student: Student, kind: str, reuse: bool, submit: bool) -> None:
    make, expected_kind = KINDS[kind]
    arrays, grad_output = drawn(student)
    plain = student.wrapper(P)
    expected, gradients = plain.forward_sft(*arrays), plain.backward(grad_output)
    sft = student.wrapper(P, reuse_buffers=reuse)
    theirs = [make(array.reshape(2, 3, -1)) for array in arrays]
    if submit:
        sft.submit_forward_sft(*theirs)
        out = sft.sync_forward_sft()
        sft.submit_backward(make(grad_output.reshape(2, 3, H)))
        found = sft.sync_backward()
    else:
        out = sft.forward_sft(*theirs)
        found = sft.backward(make(grad_output.reshape(2, 3, H)))
    assert kind_of(out) == expected_kind
    assert_same_bits(numpy_of(out), expected.reshape(2, 3, H))
    assert each_result(found).keys() == each_result(gradients).keys()
    for name, value in each_result(gradients).items():
        result = each_result(found)[name]
        assert kind_of(result) == expected_kind
        shape = (2, 3, value.shape[-1]) if name.startswith("grad_") else value.shape
        assert_same_bits(numpy_of(result), value.reshape(shape), name)


@pytest.mark.crosscheck
@pytest.mark.parametrize("kind", ["torch", "DLPack", "interface"])
def test_gradients_go_to_arrays_of_another_kind(student: Student, kind: str) -> None:
    make = KINDS[kind][0]
    arrays, grad_output = drawn(student)
    sft = student.wrapper(P)
    sft.forward_sft(*arrays)
    once = sft.backward(grad_output)
    given = SFTGradients(
        make(np.zeros((T, H), bf16)),
        make(np.zeros((T, P), np.float32)),
        **{name: make(value) for name, value in once.matrices.items()},
    )
    sft.forward_sft(*arrays)
    rows = {"grad_input": given.grad_input, "grad_weights": given.grad_weights}
    found = sft.backward(grad_output, gradients=given, accumulate=True, **rows)
    for name, value in each_result(given).items():
        assert each_result(found)[name] is value
        assert_same_bits(numpy_of(found.grad_input), once.grad_input)
    for name, value in once.matrices.items():
        np.testing.assert_array_equal(numpy_of(each_result(given)[name]), 2 * value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_other_floats_are_rounded_once(student: Student, dtype: type[Any]) -> None:
    (x, ids, weights), grad_output = drawn(student)
    x, grad_output = (array.astype(np.float32) * 1.001 for array in (x, grad_output))
    x, grad_output = x.astype(dtype), grad_output.astype(dtype)
    sft = student.wrapper(P)
    expected = sft.forward_sft(x.astype(bf16), ids, weights.astype(np.float32))
    gradients = sft.backward(grad_output.astype(bf16))
    assert_same_bits(sft.forward_sft(x, ids, weights.astype(np.float64)), expected)
    found = sft.backward(grad_output)
    for name, value in each_result(gradients).items():
        assert_same_bits(each_result(found)[name], value, name)


@pytest.mark.crosscheck
def test_adapters_may_be_parameters(student: Student) -> None:
    torch = pytest.importorskip("torch")
    sft = student.wrapper(P)
    sft.update_lora_weights(
        **{name: torch.nn.Parameter(of_torch(value)) for name, value in student.lora.items()}
    )
    for name, value in student.lora.items():
        assert_same_bits(sft.lora_weights[name], value, name)


@pytest.mark.crosscheck
def test_what_would_lose_a_gradient_is_refused(student: Student) -> None:
    torch = pytest.importorskip("torch")
    arrays, grad_output = drawn(student)
    x, ids, weights = map(of_torch, arrays)
    sft = student.wrapper(P)
    with pytest.raises(TypeError, match=r"^hidden_states: got a torch tensor that requires grad.*moe_sft"):
        sft.forward_sft(x.requires_grad_(), ids, weights)
    assert sft.num_cached == 0
    with torch.no_grad():
        sft.forward_sft(x, ids, weights)
    with pytest.raises(TypeError, match=r"^grad_input: got a JAX array, which cannot be written"):
        sft.backward(grad_output, grad_input=of_jax(np.zeros((T, H), bf16)))
    assert sft.num_cached == 1
