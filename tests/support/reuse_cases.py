"""What the tests of `reuse_buffers` begin with: layers that do and do not, and the results of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from layers import AnyArray, Batch, assert_same_bits
from sft_layers import BF16, Method, Student, by_name, draw_student, draw_training

__all__ = [
    "E",
    "H",
    "I",
    "P",
    "R",
    "Training",
    "addresses",
    "assert_same",
    "copied",
    "drawn",
    "drawn_student",
    "pair",
    "step",
]

E, I, H, P, R = 4, 24, 40, 2, 3  # noqa: E741

#: A batch and the gradient of its output.
Training = tuple[Batch, AnyArray]


def drawn_student(method: Method = BF16, seed: int = 0) -> Student:
    return draw_student(np.random.default_rng(seed), (E, I, H), R, method=method)


def drawn(student: Student, num_tokens: int, seed: int) -> Training:
    return draw_training(np.random.default_rng(seed), student, num_tokens, P)


def pair(student: Student, **options: Any) -> tuple[Any, Any]:
    """Two layers with the same weights: one that reuses its buffers, and one that does not."""
    return student.wrapper(P, reuse_buffers=True, **options), student.wrapper(P, **options)


def step(moe: Any, training: Training, **options: Any) -> dict[str, AnyArray]:
    """The results of a forward and a backward pass, as they were returned."""
    batch, grad_output = training
    y = moe.forward_sft(*batch)
    return {"y": y, **by_name(moe.backward(grad_output, **options))}


def copied(results: dict[str, AnyArray]) -> dict[str, AnyArray]:
    return {name: array.copy() for name, array in results.items()}


def addresses(results: dict[str, AnyArray]) -> dict[str, int]:
    return {name: array.ctypes.data for name, array in results.items()}


def assert_same(found: dict[str, AnyArray], expected: dict[str, AnyArray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert found[name].flags.c_contiguous
        assert found[name].flags.writeable
        assert_same_bits(found[name], array, name)
