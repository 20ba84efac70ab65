"""The experts of each token and their routing weights, with the derivative of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arithmetic import Floats, softmax, softmax_backward

__all__ = ["Route", "Router"]


@dataclass(frozen=True)
class Route:
    """The experts of each token."""

    ids: NDArray[np.int64]  #: [T, P]
    weights: Floats  #: [T, P]
    chances: Floats  #: [T, E]


@dataclass(frozen=True)
class Router:
    """The likeliest experts, with their chances as weights.

    Parameters
    ----------
    weight : float32 [H, E]
    num_experts_per_tok : int
        P.
    renormalize : bool
        The weights of a token are divided by their sum.
    """

    weight: Floats
    num_experts_per_tok: int
    renormalize: bool

    def forward(self, x: Floats) -> Route:
        """Route tokens [T, H]."""
        chances = softmax(x @ self.weight)
        ids = np.argsort(-chances, axis=-1, kind="stable")[:, : self.num_experts_per_tok]
        weights = chances[np.arange(len(x))[:, None], ids]
        if self.renormalize:
            weights = weights / np.add.reduce(weights, axis=-1, keepdims=True)
        return Route(ids, weights, chances)

    def backward(self, route: Route, grad: Floats) -> Floats:
        """The gradient by tokens [T, H], of that by the weights [T, P]; which experts are chosen stays."""
        if self.renormalize:
            chosen: Any = np.take_along_axis(route.chances, route.ids, -1)
            grad = (grad - (grad * route.weights).sum(-1, keepdims=True)) / chosen.sum(-1, keepdims=True)
        grad_chances = np.zeros_like(route.chances)
        np.put_along_axis(grad_chances, route.ids, grad, -1)
        result: Floats = softmax_backward(route.chances, grad_chances) @ self.weight.T
        return result
