"""The experts of one layer of a checkpoint in one form, without a copy where the layout allows it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import chosen_experts
from ..arrays.types import IntegersLike
from ..config import MoEConfig
from ..formats.weights import ExpertWeights, Projection
from .layouts.layer import ExpertLayer, expert_layers, find_layer
from .layouts.name_patterns import NamePattern
from .safetensors.checkpoint import SafetensorsCheckpoint

__all__ = ["expert_layers", "find_experts", "load_experts"]

AnyArray = NDArray[Any]

#: Rows that `_transposed` moves at a time: measured fastest for 2-byte values, 6 GB/s against 1.2 in one go.
_TRANSPOSE_STRIP = 32

#: NumPy moves its own types much faster than ml_dtypes.
_BITS = {2: np.uint16, 4: np.uint32}


def load_experts(
    checkpoint: SafetensorsCheckpoint | str | os.PathLike[str],
    layer_idx: int,
    config: MoEConfig | None = None,
    experts: IntegersLike | None = None,
) -> ExpertWeights:
    """Find the experts of a layer, by any of the known tensor names (`ktmoe_np.io.layouts.name_patterns`).

    Parameters
    ----------
    checkpoint : SafetensorsCheckpoint, str or path-like
        Give a `SafetensorsCheckpoint` when loading more than one layer: it keeps its index and headers.
    layer_idx : int
        The layer's number in the model.
    config : MoEConfig, optional
        What the whole layer must be; without it the sizes are taken from the tensors.
    experts : array of int, optional
        The experts to load, in this order; None loads all. Of others only the names are looked at, and files
        that hold nothing else are not opened.

    Returns
    -------
    ExpertWeights
        Numbers, one matrix for each expert. Views of the mapped files wherever K stays contiguous: rows may
        have a stride of their own. Transposed layouts are copied once, and so is a tensor that its file
        misaligns.
        Weights in the dtype of their file: bfloat16, float32 or float16, the same for all experts of a
        projection. Biases in float32.

    Raises
    ------
    FileNotFoundError
        No checkpoint there, or a shard is missing.
    ValueError
        The layer has no experts (names the layers that have), a tensor is missing or of another dtype or
        shape (names the file and the tensor), or the experts are not those that `config` describes. Or
        `experts` that repeat or are none.
    TypeError, IndexError
        `experts` that are not integers, or not of the layer.

    Examples
    --------
    >>> import json, tempfile, pathlib
    >>> stem, projections = "model.layers.0.mlp.experts", ("gate_proj", "up_proj", "down_proj")
    >>> names = [f"{stem}.{e}.{projection}.weight" for e in (0, 1) for projection in projections]
    >>> spans = {name: [8 * i, 8 * i + 8] for i, name in enumerate(names)}
    >>> entry = {"dtype": "BF16", "shape": [2, 2]}
    >>> header = {name: {**entry, "data_offsets": span} for name, span in spans.items()}
    >>> header = json.dumps(header).encode()
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8 * len(names)))
    >>> experts = load_experts(path.parent, layer_idx=0)
    >>> experts.num_experts, experts.gate.codes[1].shape, experts.gate.codes[1].dtype.name
    (2, (2, 2), 'bfloat16')
    """
    found = find_experts(SafetensorsCheckpoint.opened(checkpoint), layer_idx, config, experts)
    return _build(*found, None if experts is None else chosen_experts(experts, found[2][0]))


def find_experts(
    checkpoint: SafetensorsCheckpoint,
    layer_idx: int,
    config: MoEConfig | None = None,
    experts: IntegersLike | None = None,
) -> tuple[ExpertLayer, NamePattern, tuple[int, int, int]]:
    """Find what `load_experts` reads, by the headers alone: the layer, its pattern, and E, I and H.

    Errors are those of `load_experts`.
    """
    layer = find_layer(checkpoint, layer_idx)
    problems = []
    for pattern in layer.patterns():
        sizes = layer.sizes(pattern, config)
        chosen = None if experts is None else chosen_experts(experts, sizes[0])
        problem = layer.problem(pattern, sizes, "" if config is None else config.origin(), chosen)
        if problem is None:
            if config is not None:
                layer.check_gated(pattern, config)
            return layer, pattern, sizes
        problems.append(problem)
    raise problems[0]


def _build(
    layer: ExpertLayer,
    pattern: NamePattern,
    sizes: tuple[int, int, int],
    experts: Sequence[int] | None,
) -> ExpertWeights:
    """Read, split and, where the layout needs it, transpose."""
    num_experts = sizes[0]
    axis = 1 if pattern.transposed else 0
    weights: dict[str, list[AnyArray]] = {}
    biases: dict[str, list[AnyArray]] = {}
    for role, template in pattern.tensors.items():
        arrays = layer.tensors(pattern, template, num_experts, experts)
        _store(weights, role, arrays, axis, pattern.interleaved)
    if pattern.transposed:
        weights = {role: [_transposed(matrix) for matrix in matrices] for role, matrices in weights.items()}
    if layer.has_biases(pattern):
        for role, template in pattern.biases.items():
            arrays = layer.tensors(pattern, template, num_experts, experts)
            _store(biases, role, arrays, 0, pattern.interleaved)
    stacked = {role: np.stack([v.astype(np.float32) for v in vectors]) for role, vectors in biases.items()}
    projections = {
        f"{role}_proj": Projection(matrices, bias=stacked.get(role)) for role, matrices in weights.items()
    }
    return ExpertWeights.of(projections, names=layer.names(pattern, sizes, experts))


def _store(
    into: dict[str, list[AnyArray]], role: str, arrays: list[AnyArray], axis: int, interleaved: bool
) -> None:
    """Put the arrays of a role where they belong: of gate_up, each half, as views."""
    if role != "gate_up":
        into[role] = arrays
        return
    half = arrays[0].shape[axis] // 2
    cuts = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    for name, cut in zip(("gate", "up"), cuts, strict=True):
        into[name] = [array[(slice(None),) * axis + (cut,)] for array in arrays]


def _transposed(matrix: AnyArray) -> AnyArray:
    """Copy a matrix to its transpose, contiguous."""
    bits = matrix.view(_BITS[matrix.itemsize])
    result = np.empty(bits.shape[::-1], bits.dtype)
    for start in range(0, bits.shape[0], _TRANSPOSE_STRIP):
        strip = slice(start, start + _TRANSPOSE_STRIP)
        result[:, strip] = bits[strip].T
    return result.view(matrix.dtype)
