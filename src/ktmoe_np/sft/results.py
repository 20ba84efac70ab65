"""The arrays that passes of training are written to when the caller gives none."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import Array, bfloat16
from ..buffers import Claim, KExpertsSFTBuffer, SFTBatchBuffers

if TYPE_CHECKING:
    from .lora import LoraLayer

__all__ = ["Results"]


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

    def output(self, num_tokens: int, hidden_states: Any, claim: Claim | None) -> Array:
        """For a forward pass: bfloat16 [T, H]."""
        if self._reuse:
            buffers = self._buffers(num_tokens)
            if _disjoint(buffers.output, hidden_states) and buffers.claims.take("output", claim):
                return buffers.output.view()
        return np.empty((num_tokens, self._config.hidden_size), bfloat16)

    def row_gradients(
        self, num_tokens: int, grad_output: Any, claim: Claim | None
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

    def claim_given(self, name: str, given: Iterable[Any], num_tokens: int, claim: Claim | None) -> None:
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


def _disjoint(array: Array, read: Any) -> bool:
    """Whether an array has nothing of what is read. Arrays of other libraries are the engine's to check."""
    return not (isinstance(read, np.ndarray) and np.may_share_memory(array, read))
