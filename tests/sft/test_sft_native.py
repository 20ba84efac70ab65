"""Training on a checkpoint's own encoding, beyond what `test_sft_quantized` says of all methods."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from layers import Batch, assert_same_bits
from native_layers import CONVERTED, IN_PLACE, NativeLayer
from native_layers import METHODS as INFERENCE_METHODS
from sft_layers import (
    Student,
    assert_same_steps,
    assert_step_close,
    draw_student,
    draw_training,
    per_matrix,
    train,
)

from ktmoe_np import SFTGradients
from ktmoe_np.formats.methods import find_method

pytestmark = pytest.mark.kernels

AnyArray = Any

METHODS = tuple(f"{name}_SFT" for name in INFERENCE_METHODS)
every_method = pytest.mark.parametrize("method", METHODS)


def inference_name(method: str) -> str:
    return method.partition("_SFT")[0]


def drawn(
    seed: int,
    method: str,
    size: tuple[int, int, int] = (3, 45, 130),
    num_tokens: int = 20,
) -> tuple[Student, Batch, AnyArray]:
    rng = np.random.default_rng(seed)
    student = draw_student(rng, size, 8, method=(method, None), with_biases=bool(rng.integers(2)))
    return student, *draw_training(rng, student, num_tokens, 2)


@every_method
@pytest.mark.parametrize("num_tokens", [1, 9, 40])
@pytest.mark.parametrize("size", [(2, 704, 96), (1, 33, 2081)])
def test_widths_of_models(method: str, num_tokens: int, size: tuple[int, int, int]) -> None:
    student, batch, grad_output = drawn(1, method, size, num_tokens)
    batch.ids[...] = np.arange(batch.ids.size).reshape(batch.ids.shape) % size[0]  # none is skipped
    assert_step_close(train(student.wrapper(2), batch, grad_output), student, batch, grad_output)


@every_method
def test_accumulated_gradients_are_added_to_those_that_are_there(method: str) -> None:
    student, batch, grad_output = drawn(8, method)
    moe = student.wrapper(2)
    parts = [slice(0, 1), slice(1, 10), slice(10, 20)]
    alone = [per_matrix(train(moe, batch.rows(part), grad_output[part])) for part in parts]
    first = {name: np.ones(matrix.shape, np.float32) for name, matrix in student.lora.items()}
    none = np.empty(0, np.float32)
    into = SFTGradients(none, none, **{name: value.copy() for name, value in first.items()})
    for part in parts:
        train(moe, batch.rows(part), grad_output[part], gradients=into, accumulate=True)
    for name, value in first.items():
        for gradients in alone:
            value = value + gradients[name]  # in the order of the passes, as float32 sums round
        assert_same_bits(into.matrices[name], value, name)


@pytest.mark.parametrize("suffix", ["", "_SkipLoRA"])
def test_fp8_trains_by_two_names(suffix: str) -> None:
    student, batch, grad_output = drawn(6, "FP8_SFT")
    step = train(student.wrapper(2, method=f"FP8_SFT{suffix}"), batch, grad_output)
    assert_same_steps(train(student.wrapper(2, method=f"AMXFP8_SFT{suffix}"), batch, grad_output), step)


@every_method
def test_experts_are_as_large_as_for_inference(method: str) -> None:
    student, _, _ = drawn(10, method)
    layer = student.layer
    assert isinstance(layer, NativeLayer)
    held = sum(given.nbytes for given in layer.arguments.values() if isinstance(given, np.ndarray))
    if inference_name(method) not in IN_PLACE:
        held = sum(matrix.size for matrix in layer.matrices) * CONVERTED[inference_name(method)] // 32
    inference = layer.wrapper(2, method=inference_name(method))
    assert student.wrapper(2).expert_bytes == inference.expert_bytes == held // layer.num_experts


@every_method
def test_gradients_of_the_weights_are_refused(method: str) -> None:
    student, _, _ = drawn(7, method)
    weights = find_method(method, "sft").weights
    why = f"the base weights of method '{method}' are {weights}, and only those in bf16 have gradients"
    skipping = f"method '{method}_SkipLoRA' has no gradients of weights"
    for name, reason in ((method, why), (f"{method}_SkipLoRA", skipping)):
        message = f"full_weight_grad: got True, expected False: {reason}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            student.wrapper(2, method=name, full_weight_grad=True)
