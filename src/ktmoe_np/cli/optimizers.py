"""What minimises the loss: Adam in NumPy, or any optimiser of optax that a learning rate is enough for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from .._arrays import Array
from .adam import Adam

__all__ = ["Optimizer", "make_optimizer"]

_OPTAX = "optax."


class Optimizer(Protocol):
    """What is needed of one; parameters are changed in place."""

    def step(self, gradients: Mapping[str, Array]) -> None:
        """Take one step by the gradients of all parameters."""

    def state(self) -> dict[str, Array]:
        """What `restore` needs to go on."""

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a state of the same parameters."""


def make_optimizer(name: str, parameters: Mapping[str, Array], rate: float) -> Optimizer:
    """Make ``adam``, or ``optax.NAME``.

    Raises
    ------
    ValueError
        Another name, or one that optax does not have.
    ImportError
        optax is not installed; says how to get it.
    """
    if name == "adam":
        return Adam(parameters, rate)
    if not name.startswith(_OPTAX):
        raise ValueError(f"--optimizer: got {name!r}, expected adam or optax.NAME, as in optax.adamw")
    return _Optax(name.removeprefix(_OPTAX), parameters, rate)


class _Optax:
    """An optimiser of optax on arrays of NumPy."""

    def __init__(self, name: str, parameters: Mapping[str, Array], rate: float) -> None:
        try:
            optax, self._jax = importlib.import_module("optax"), importlib.import_module("jax")
        except ImportError as error:
            raise ImportError(f"--optimizer {_OPTAX}{name}: needs: pip install optax jax") from error
        try:
            made = getattr(optax, name)(rate)
        except (AttributeError, TypeError):  # none of that name, or one that wants something else
            made = None
        if not isinstance(made, optax.GradientTransformation):
            raise ValueError(f"--optimizer: got {_OPTAX}{name}, expected the name of an optimiser of optax")
        self._apply = optax.apply_updates
        self._update = self._jax.jit(made.update)
        self._parameters = dict(parameters)
        self._state: Any = made.init(self._parameters)

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
