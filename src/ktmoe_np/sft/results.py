"""The arrays that passes of training are written to when the caller gives none."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import Array, bfloat16
from ..arrays.host import to_write
from ..arrays.rows import RowForm, rows_to_write
from ..buffers import Claim, KExpertsSFTBuffer, SFTBatchBuffers
from .gradients import SFTGradients

if TYPE_CHECKING:
    from .lora import LoraLayer

__all__ = ["BackwardResults", "Results"]


class BackwardResults:
    """The arrays that a backward pass writes: NumPy arrays of the engine, and what the caller gets.

    Parameters
    ----------
    form : RowForm
        Of results that belong to the rows of the gradient of the output; new matrices are of its kind too.
    given : mapping of str to array
        Arrays of the caller for gradients of matrices.
    """

    def __init__(self, form: RowForm, given: Mapping[str, Any]) -> None:
        self._form = form
        self._given: dict[str, Any] = dict(given)
        self.rows: dict[str, Array] = {}  #: grad_input and grad_weights, [T, N]
        self.matrices = {name: to_write(array, name) for name, array in given.items()}

    def new_matrices(self, arrays: Mapping[str, Array]) -> None:
        """Write gradients of matrices to these."""
        self.matrices.update(arrays)

    def write_rows(self, name: str, given: Any, width: int) -> None:
        """Write gradients of rows to an array of the caller, if there is one."""
        if given is not None:
            self._given[name] = given
            self.rows[name] = rows_to_write(given, name, self._form.lead, width)

    def new_rows(self, grad_input: Array, grad_weights: Array) -> None:
        """Write gradients of rows to these where the caller has no array."""
        self.rows = {"grad_input": grad_input, "grad_weights": grad_weights, **self.rows}

    def given(self) -> SFTGradients:
        """The gradients, when the pass is done."""
        rows = {name: self._form.of(array) for name, array in self.rows.items() if name not in self._given}
        matrices = {
            name: self._form.give(array) for name, array in self.matrices.items() if name not in self._given
        }
        return SFTGradients(**{**rows, **matrices, **self._given})


class Results:
    """Arrays for the results of the passes of a layer: new ones, or those of the previous step.

    A pass gets new ones also where it reads those of the previous step, and while a submitted pass whose
    result has not been taken has a claim to them.

    Parameters
    ----------
    layer : LoraLayer
    shapes : mapping of str to tuple of int
        Of the matrices that have gradients.
    """

    def __init__(self, layer: LoraLayer, shapes: Mapping[str, tuple[int, int, int]]) -> None:
        self._layer = weakref.ref(layer)
        self._config = layer.config
        self._shapes = shapes
        self._reuse = layer.options.reuse_buffers

    def output(self, num_tokens: int, hidden_states: Array, claim: Claim | None) -> Array:
        """For a forward pass: bfloat16 [T, H]."""
        if self._reuse:
            buffers = self._buffers(num_tokens)
            if _disjoint(buffers.output, hidden_states) and buffers.claims.take("output", claim):
                return buffers.output.view()
        return np.empty((num_tokens, self._config.hidden_size), bfloat16)

    def row_gradients(
        self, num_tokens: int, grad_output: Array, claim: Claim | None
    ) -> tuple[Array, NDArray[np.float32]]:
        """For a backward pass: the gradients of the input, bfloat16 [T, H], and of the weights, [T, P]."""
        if self._reuse:
            buffers = self._buffers(num_tokens)
            if _disjoint(buffers.grad_input, grad_output) and buffers.claims.take("gradients", claim):
                return buffers.grad_input.view(), buffers.grad_weights.view()
        shape = num_tokens, self._config.num_experts_per_tok
        return np.empty((num_tokens, self._config.hidden_size), bfloat16), np.empty(shape, np.float32)

    def matrices(self, claim: Claim | None) -> dict[str, NDArray[np.float32]]:
        """For a backward pass: the gradients of matrices, by name."""
        if self._reuse:
            found = KExpertsSFTBuffer.get_matrices(self._layer(), self._shapes)
            if found.claims.take("all", claim):
                return {name: array.view() for name, array in found.arrays.items()}
        return {name: np.empty(shape, np.float32) for name, shape in self._shapes.items()}

    def claim_given(self, name: str, given: Iterable[Array], num_tokens: int, claim: Claim | None) -> None:
        """Let a pass claim the buffers' arrays too where the caller's arrays share their memory."""
        if not self._reuse or claim is None:
            return
        buffers = self._buffers(num_tokens)
        own = (buffers.output,) if name == "output" else (buffers.grad_input, buffers.grad_weights)
        if any(not _disjoint(mine, array) for mine in own for array in given):
            buffers.claims.take(name, claim)

    def _buffers(self, num_tokens: int) -> SFTBatchBuffers:
        config = self._config
        both = KExpertsSFTBuffer.get_buffer(num_tokens, config.hidden_size, config.num_experts_per_tok)
        return both[config.layer_idx % KExpertsSFTBuffer.buffer_depth]


def _disjoint(array: Array, read: Array) -> bool:
    """Whether an array has nothing of what is read."""
    return not np.may_share_memory(array, read)
