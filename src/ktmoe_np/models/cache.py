"""The key-value cache of a sequence: keys and values of its tokens, layer by layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..arrays.summary import object_summary

__all__ = ["KVCache"]

_Floats = NDArray[np.float32]

#: Tokens that there is room for at first.
_ROOM = 64


class KVCache:
    """Keys and values of one sequence; room grows by doubling.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim : int

    Attributes
    ----------
    length : int
        Tokens that are behind.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        self.length = 0
        self._shape = num_kv_heads, head_dim
        self._keys = [self._empty(_ROOM) for _ in range(num_layers)]
        self._values = [self._empty(_ROOM) for _ in range(num_layers)]

    def __repr__(self) -> str:
        return object_summary(self, lambda: f"{self.length} tokens in {len(self._keys)} layers")

    def append(self, layer: int, keys: _Floats, values: _Floats) -> tuple[_Floats, _Floats]:
        """Store [kv heads, T, D] of a layer behind `length`; all of the layer's, those included."""
        end = self.length + keys.shape[1]
        for kept, new in ((self._keys, keys), (self._values, values)):
            if kept[layer].shape[1] < end:
                longer = self._empty(max(end, 2 * kept[layer].shape[1]))
                longer[:, : self.length] = kept[layer][:, : self.length]
                kept[layer] = longer
            kept[layer][:, self.length : end] = new
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def advance(self, num_tokens: int) -> None:
        """Count tokens whose keys and values every layer has stored."""
        self.length += num_tokens

    def _empty(self, room: int) -> _Floats:
        return np.empty((self._shape[0], room, self._shape[1]), np.float32)
