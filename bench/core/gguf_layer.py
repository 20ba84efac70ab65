"""How a layer in blocks of one GGUF type is handed over, whatever makes the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .layer import Array, Layer

__all__ = ["PROJECTIONS", "layer_in_blocks"]

PROJECTIONS = ("gate", "up", "down")


def layer_in_blocks(
    layer: Layer, type_name: str, block: int, block_bytes: int, write: Callable[[str, Array, Array], None]
) -> dict[str, Any]:
    """Make what a layer is loaded from, each projection in one array as in a file.

    `write` gets a projection, its weights [E, N, K], and the rows of blocks to fill, uint8 [E, N, bytes].

    Raises
    ------
    ValueError
        Rows are not whole blocks.
    """
    arguments: dict[str, Any] = {}
    for name in PROJECTIONS:
        weights = getattr(layer, name)
        num_experts, num_rows, num_columns = weights.shape
        if num_columns % block:
            raise ValueError(f"{type_name}: got rows of {num_columns}, expected a multiple of {block}")
        rows = np.empty((num_experts, num_rows, num_columns // block * block_bytes), np.uint8)
        write(name, weights, rows)
        arguments[f"{name}_proj"], arguments[f"{name}_format"] = rows, type_name
        arguments[f"{name}_bias"] = getattr(layer, f"{name}_bias")
    return arguments
