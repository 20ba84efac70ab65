"""Common to `ktmoe convert` and `ktmoe verify`: the error of quantized weights, and its table."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MoEConfig
from ..formats.methods import METHODS, Method, find_method
from ..formats.quantized import QuantizedFormat
from ..formats.weights import ExpertWeights
from ..io.converted.layer import projection_sizes
from ..io.mapped import MappedFiles
from ..io.regular_file import open_regular
from .quantized_reference import dequantize_rows
from .table import counted, wrap

__all__ = [
    "LayerRow",
    "file_digest",
    "find_quantizing",
    "note_on_sample",
    "render",
    "sample_experts",
    "source_matrices",
    "weight_errors",
]

#: Of each layer, how many experts are decoded and compared, and how many weights of a projection that may be.
_MAX_EXPERTS, _MAX_WEIGHTS = 4, 1 << 24


@dataclass(frozen=True)
class LayerRow:
    """A layer in the table."""

    layer: int
    num_bytes: int
    relative_error: Mapping[str, float]  # projection -> error; empty where it is not known
    status: str


def find_quantizing(name: str) -> Method:
    """The method of that name, which quantizes.

    Raises
    ------
    ValueError
        Unknown, or one that takes weights as they are.
    """
    method = find_method(name, "inference")
    if not method.formats:
        known = ", ".join(other.name for other in METHODS if other.formats and other.mode == "inference")
        raise ValueError(
            f"method: got {name!r}, expected one of {known}: others read checkpoints as they are"
        )
    return method


def sample_experts(config: MoEConfig) -> tuple[int, ...]:
    """Choose the experts whose weights are compared: some, evenly spread, and always one.

    Examples
    --------
    >>> sample_experts(MoEConfig(128, 8, 2048, 768))
    (0, 42, 85, 127)
    """
    weights = config.hidden_size * config.moe_intermediate_size
    count = max(1, min(config.num_experts, _MAX_EXPERTS, _MAX_WEIGHTS // weights))
    spread = np.linspace(0, config.num_experts - 1, count).round().astype(int)
    return tuple(spread.tolist())


def source_matrices(experts: ExpertWeights) -> dict[str, Any]:
    """Matrices of a checkpoint by projection."""
    return {name: projection.codes for name, projection in experts.projections.items()}


def weight_errors(
    fmt: QuantizedFormat,
    quantized: ExpertWeights,
    source: Mapping[str, Any],
    config: MoEConfig,
    sample: Sequence[int],
) -> dict[str, float]:
    """Compute ||decoded - weights|| / ||weights|| of each projection over some experts."""
    errors = {}
    for name, (_, num_columns) in projection_sizes(config).items():
        matrix = quantized.projections[name]
        distance = norm = 0.0
        for e in sample:
            scale = None if matrix.channel_scale is None else matrix.channel_scale[e]
            MappedFiles([source[name][e], matrix.codes[e]]).check()
            weights = source[name][e].astype(np.float32)
            away = dequantize_rows(fmt, matrix.codes[e], scale, num_columns) - weights
            distance += float(np.square(away, dtype=np.float64).sum())
            norm += float(np.square(weights, dtype=np.float64).sum())
        errors[name] = math.sqrt(distance / norm) if norm else 0.0
    return errors


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def note_on_sample(num_checked: int) -> str:
    """Say what the errors of the table are."""
    return wrap(
        "Relative error: distance of the decoded weights from those of the source, to the norm of these, "
        f"over a sample of {counted(num_checked, 'expert')} in each layer."
    )


def render(rows: Sequence[LayerRow]) -> str:
    """Set the rows as text."""
    names = list(dict.fromkeys(name for row in rows for name in row.relative_error))
    cells = [("layer", "MB", *names, "")]
    for row in rows:
        errors = (f"{row.relative_error[n]:.5f}" if n in row.relative_error else "-" for n in names)
        cells.append((str(row.layer), f"{row.num_bytes / 1e6:.3g}", *errors, row.status))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for *numbers, status in cells:
        line = "  ".join(f"{cell:>{width}}" for cell, width in zip(numbers, widths[:-1], strict=True))
        lines.append(f"{line}  {status}".rstrip())
    lines.insert(1, "-" * (sum(widths[:-1]) + 2 * (len(widths) - 2)))
    return "\n".join(lines)
