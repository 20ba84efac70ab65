"""Optimizers: Adam in NumPy, or any optax optimizer that only needs a learning rate."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ..arrays.checks import Array
from .adam import Adam

__all__ = ["Optimizer", "make_optimizer"]

_OPTAX = "optax."


class Optimizer(Protocol):
    """The interface of an optimizer; parameters are changed in place."""

    def step(self, gradients: Mapping[str, Array]) -> None:
        """Take one step by the gradients of all parameters."""

    def state(self) -> dict[str, Array]:
        """The state for `restore`."""

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a state of the same parameters."""


def make_optimizer(name: str, parameters: Mapping[str, Array], rate: float) -> Optimizer:
    """Make ``adam``, or ``optax.NAME``.

    Parameters
    ----------
    name : str
    parameters : mapping of str to ndarray of float32
        Changed in place by its steps.
    rate : float
        The learning rate.

    Returns
    -------
    Optimizer

    Raises
    ------
    ValueError
        Another name, or not that of an optimizer of optax.
    ImportError
        optax is not installed; says how to get it.
    """
    if name == "adam":
        return Adam(parameters, rate)
    if not name.startswith(_OPTAX):
        raise ValueError(f"--optimizer: got {name!r}, expected adam or optax.NAME, as in optax.adamw")
    return _Optax(name.removeprefix(_OPTAX), parameters, rate)


class _Optax:
    """An optax optimizer on NumPy arrays."""

    def __init__(self, name: str, parameters: Mapping[str, Array], rate: float) -> None:
        try:
            optax, self._jax = importlib.import_module("optax"), importlib.import_module("jax")
        except ImportError as error:
            raise ImportError(f"--optimizer {_OPTAX}{name}: needs: pip install optax jax") from error
        self._apply = optax.apply_updates
        if not self._descends(getattr(optax, name, None)):
            expected = "the name of an optimizer of optax that needs a learning rate and gradients alone"
            raise ValueError(f"--optimizer: got {_OPTAX}{name}, expected {expected}")
        made = getattr(optax, name)(rate)
        self._update = self._jax.jit(made.update)
        self._parameters = dict(parameters)
        self._state: Any = made.init(self._parameters)

    def _descends(self, make: Any) -> bool:
        """Whether it can be used here: two steps of it go down x^2 / 2, and its state is arrays."""
        x = np.full(3, 2.0, np.float32)
        try:
            made = make(1e-3)
            state = made.init(x)
            for _ in range(2):
                updates, state = made.update(x, state, x)
                x = np.asarray(self._apply(x, updates))
            for leaf in self._jax.tree_util.tree_leaves(state):
                np.asarray(leaf)
        except Exception:  # objects of optax that need other arguments
            return False
        return bool((np.abs(x) < 2).all())

    def step(self, gradients: Mapping[str, Array]) -> None:
        updates, self._state = self._update(dict(gradients), self._state, self._parameters)
        for name, value in self._apply(self._parameters, updates).items():
            self._parameters[name][:] = value

    def state(self) -> dict[str, Array]:
        leaves = self._jax.tree_util.tree_leaves(self._state)
        return {f"leaf.{i}": np.atleast_1d(np.asarray(leaf)) for i, leaf in enumerate(leaves)}

    def restore(self, state: Mapping[str, Array]) -> None:
        leaves, structure = self._jax.tree_util.tree_flatten(self._state)
        given = [np.reshape(state[f"leaf.{i}"], np.shape(leaf)) for i, leaf in enumerate(leaves)]
        self._state = self._jax.tree_util.tree_unflatten(structure, given)
