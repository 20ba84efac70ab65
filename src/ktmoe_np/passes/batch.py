"""A batch of tokens as passes take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import Array, bfloat16
from ..arrays.rows import hidden_rows, routes, rows_to_write, weights_of_routes
from ..config import MoEConfig

__all__ = ["Batch"]


def _new_out(hidden_states: Array) -> Array:
    return np.empty(hidden_states.shape, bfloat16)


def _no_adapters(lead: tuple[int, ...]) -> None:
    return None


class Batch:
    """The arrays of one forward pass, as NumPy arrays [T, ...] of the caller's memory.

    Parameters
    ----------
    config : MoEConfig
        The layer's sizes.
    hidden_states, topk_ids, topk_weights : array
        As `BaseMoEWrapper.forward` takes them.
    out : array, optional
        Where to write; None for a new array.
    incremental : bool
        Add to `out`.
    activation_dtype : str, optional
        None for the layer's.
    adapters : callable, optional
        Makes the numbers of the adapters of tokens [T] from the leading axes of the hidden states.
    new_out : callable, optional
        Makes the array [T, H] to write to where `out` is None, knowing the hidden states.

    Raises
    ------
    TypeError, ValueError
        An array that is not as it should be, or no `out` to add to. The engine checks dtype and order of
        `out`.
    """

    def __init__(
        self,
        config: MoEConfig,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        out: Any,
        incremental: bool,
        activation_dtype: str | None = None,
        adapters: Callable[[tuple[int, ...]], NDArray[np.int32] | None] = _no_adapters,
        new_out: Callable[[Array], Array] = _new_out,
    ) -> None:
        hidden, slots = config.hidden_size, config.num_experts_per_tok
        self.hidden_states, self.form = hidden_rows(hidden_states, "hidden_states", hidden)
        lead = self.form.lead
        self.num_tokens = len(self.hidden_states)
        self.ids = routes(topk_ids, lead, slots)
        self.weights = weights_of_routes(topk_weights, lead, slots)
        self._given = out
        if out is not None:
            self.out: Array = rows_to_write(out, "out", lead, hidden)
        elif incremental:
            raise ValueError("out: got None with incremental=True, expected the array to add to")
        else:
            self.out = new_out(self.hidden_states)
        self.incremental = incremental
        self.activation_dtype = activation_dtype
        self.adapters = adapters(lead)

    def result(self) -> Any:
        """`out` as it was given, or the new array as one of the kind of the hidden states."""
        return self.form.of(self.out) if self._given is None else self._given
