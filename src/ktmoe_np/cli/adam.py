"""Adam (Kingma and Ba, 2015) in NumPy, on named arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..arrays.checks import Array

__all__ = ["Adam"]


class Adam:
    """Minimize by gradients and their running moments.

    With t the number of the step, for each element::

        m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
        p = p - rate * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Parameters
    ----------
    parameters : mapping of str to ndarray of float32
        Changed in place by `step`.
    rate : float
        The learning rate.
    betas : pair of float, optional
    eps : float, optional

    Examples
    --------
    >>> import numpy as np
    >>> x = np.float32([4.0])
    >>> adam = Adam({"x": x}, rate=1.0)
    >>> adam.step({"x": 2 * x})
    >>> x
    array([3.], dtype=float32)
    """

    def __init__(
        self,
        parameters: Mapping[str, Array],
        rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._parameters = dict(parameters)
        self._rate, self._betas, self._eps = rate, betas, eps
        self._first = {name: np.zeros_like(value) for name, value in self._parameters.items()}
        self._second = {name: np.zeros_like(value) for name, value in self._parameters.items()}
        self._num_steps = 0

    def state(self) -> dict[str, Array]:
        """The state for `restore`: the moments and the number of steps; not copied."""
        moments = (("first", self._first), ("second", self._second))
        named = {f"{kind}.{name}": value for kind, of in moments for name, value in of.items()}
        return {**named, "num_steps": np.array([self._num_steps])}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a state of the same parameters."""
        for name in self._parameters:
            self._first[name][:] = state[f"first.{name}"]
            self._second[name][:] = state[f"second.{name}"]
        self._num_steps = int(state["num_steps"][0])

    def step(self, gradients: Mapping[str, Array]) -> None:
        """Take one step by the gradients of all parameters."""
        self._num_steps += 1
        b1, b2 = self._betas
        scale1, scale2 = 1 - b1**self._num_steps, 1 - b2**self._num_steps
        for name, parameter in self._parameters.items():
            first, second, gradient = self._first[name], self._second[name], gradients[name]
            first += np.float32(1 - b1) * (gradient - first)
            second += np.float32(1 - b2) * (np.square(gradient) - second)
            size = np.sqrt(second / np.float32(scale2)) + np.float32(self._eps)
            parameter -= np.float32(self._rate / scale1) * first / size
