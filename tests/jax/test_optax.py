"""Optimizers of optax in `ktmoe finetune`: they step, stop and go on as optax does by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ktmoe_np.cli.optimizers import make_optimizer

optax = pytest.importorskip("optax")

pytestmark = pytest.mark.crosscheck

NAMES = ("adamw", "sgd", "lion")


def gradients(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {"a": rng.normal(size=(2, 3)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}


def begin() -> dict[str, Any]:
    return {"a": np.ones((2, 3), np.float32), "b": np.full(4, 2, np.float32)}


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_optax(name: str) -> None:
    ours, theirs = begin(), begin()
    optimizer, original = make_optimizer(f"optax.{name}", ours, 0.1), getattr(optax, name)(0.1)
    state = original.init(theirs)
    for step in range(3):
        optimizer.step(gradients(step))
        updates, state = original.update(gradients(step), state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for key, value in ours.items():
        np.testing.assert_allclose(value, theirs[key], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_goes_on(name: str) -> None:
    whole, parts = begin(), begin()
    optimizer = make_optimizer(f"optax.{name}", whole, 0.1)
    for step in range(4):
        optimizer.step(gradients(step))
    first = make_optimizer(f"optax.{name}", parts, 0.1)
    for step in range(2):
        first.step(gradients(step))
    second = make_optimizer(f"optax.{name}", parts, 0.1)
    second.restore({key: value.copy() for key, value in first.state().items()})
    for step in range(2, 4):
        second.step(gradients(step))
    for key, value in whole.items():
        assert value.tobytes() == parts[key].tobytes()


@pytest.mark.parametrize(
    "name", ["no_such", "apply_updates", "exponential_decay", "lbfgs", "noisy_sgd", "clip", "scale"]
)
def test_other_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"--optimizer: got optax.{name}, expected the name of an optimizer"):
        make_optimizer(f"optax.{name}", begin(), 0.1)
