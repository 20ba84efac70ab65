"""What the tests of JAX programs begin with: layers that programs call, and the same for NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from layers import AnyArray, Batch, assert_same_bits
from sft_layers import Student, by_name, draw_student, draw_training

from ktmoe_np.jax import lora_parameters, moe_sft

__all__ = ["STUDENTS", "E", "H", "I", "P", "R", "Trained", "as_jax", "assert_same_gradients", "numpy"]

E, I, H, P, R = 5, 24, 40, 2, 3  # noqa: E741

#: The ungated one has no adapters of up.
STUDENTS = {"gated": "silu", "ungated": "relu2"}


def numpy(x: Any) -> AnyArray:
    """A JAX array as one of NumPy."""
    return np.asarray(x)


def as_jax(batch: Batch) -> tuple[Any, Any, Any]:
    """The arrays of a batch as those of JAX."""
    return jnp.asarray(batch.x), jnp.asarray(batch.ids), jnp.asarray(batch.weights)


class Trained:
    """A layer with adapters in both worlds: one that programs call, another that NumPy calls."""

    def __init__(
        self,
        seed: int,
        activation: str = "silu",
        method: Any = ("AMXBF16_SFT", None),
        *,
        scale_inputs: bool = False,
    ) -> None:
        rng = np.random.default_rng(seed)
        student: Student = draw_student(rng, (E, I, H), R, activation, method=method)
        student = replace(student, layer=replace(student.layer, scale_inputs=scale_inputs))
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


def assert_same_gradients(found: tuple[Any, Any, Any], expected: dict[str, AnyArray]) -> None:
    lora, x, weights = found
    got = {"grad_input": x, "grad_weights": weights, **lora}
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert_same_bits(numpy(value), expected[name], name)
