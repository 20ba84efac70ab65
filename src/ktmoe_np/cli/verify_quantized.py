"""`ktmoe verify` of what `ktmoe convert` has written: every file, and the error of its weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import MoEConfig
from ..formats.quantized import FORMATS, QuantizedFormat
from ..formats.weights import ExpertWeights
from ..io import load_hf_config
from ..io.converted.layer import check_codes, layer_path, load_quantized, quantized_layers
from ..io.converted.manifest import LayerRecord, Manifest, manifest_path, read_manifest
from ..io.layer_config import hf_layer_config
from .convert_source import ConvertSource, open_source
from .progress import Progress
from .quantized import (
    LayerRow,
    file_digest,
    find_quantizing,
    note_on_sample,
    render,
    sample_experts,
    source_matrices,
    weight_errors,
)
from .table import counted, wrap
from .terminal import say, say_json

__all__ = ["run"]

#: Errors that are measured again differ from those recorded by the order of a sum at most.
_SAME = 1e-6


def run(arguments: argparse.Namespace) -> int:
    """Check the layers; 0 when every file is whole and as exact as recorded, else 1."""
    path = Path(arguments.path)
    if arguments.activation_dtype is not None:
        raise ValueError(
            f"--activation-dtype: got {arguments.activation_dtype}, expected auto: {path} was written by "
            "'ktmoe convert', whose files are compared, not computed with"
        )
    manifest = read_manifest(path)
    method = find_quantizing(manifest.method)
    fmt = FORMATS[method.formats[method.resolve_group_size(manifest.group_size)]]
    hf_config = load_hf_config(path)
    layers = sorted({*manifest.layers, *quantized_layers(path)})
    if arguments.layer is not None:
        if arguments.layer not in layers:
            known = ", ".join(map(str, layers)) or "none"
            raise ValueError(f"{path}: layer {arguments.layer} is not there; layers that are there: {known}")
        layers = [arguments.layer]
    source, why = _open_source(manifest.source)
    rows, problems = [], []
    with Progress(len(layers), "checking") as progress:
        for layer in layers:
            progress.step(f"layer {layer}")
            config = hf_layer_config(hf_config, layer, path)
            row, problem = _check(path, config, fmt, manifest.layers.get(layer), source)
            rows.append(row)
            problems += [] if problem is None else [problem]
    if not layers:
        problems.append(f"{path}: no layer is there")
    if arguments.json:
        say_json(_report(path, manifest, rows, problems, why))
    else:
        say(_text(path, manifest, rows, problems, why))
    return 1 if problems else 0


def _open_source(source: str) -> tuple[ConvertSource | None, str | None]:
    """The model that was converted, or why it cannot be read."""
    try:
        return open_source(Path(source)), None
    except (OSError, ValueError, ImportError) as error:
        return None, " ".join(str(error).split())


def _check(
    directory: Path,
    config: MoEConfig,
    fmt: QuantizedFormat,
    record: LayerRecord | None,
    source: ConvertSource | None,
) -> tuple[LayerRow, str | None]:
    """Check a layer: its row, and what is wrong with it if anything is."""
    path = layer_path(directory, config.layer_idx)
    recorded = {} if record is None else record.relative_error
    size = path.stat().st_size if path.exists() else 0
    try:
        experts = load_quantized(path, config, fmt)
        check_codes(path, experts, config, fmt)
    except FileNotFoundError:
        return LayerRow(config.layer_idx, size, recorded, "MISSING"), f"{path}: no such file"
    except ValueError as error:
        return LayerRow(config.layer_idx, size, recorded, "DAMAGED"), str(error)
    if record is None:
        problem = f"{path}: is not in {manifest_path(directory).name}; convert the layer again"
        return LayerRow(config.layer_idx, size, recorded, "UNKNOWN"), problem
    if file_digest(path) != record.sha256:
        problem = f"{path}: SHA-256 is not {record.sha256}, which was recorded: its bytes have changed"
        return LayerRow(config.layer_idx, size, recorded, "CHANGED"), problem
    if source is None:
        return LayerRow(config.layer_idx, size, recorded, "whole"), None
    try:
        errors = _measure(experts, config, fmt, source)
    except (OSError, ValueError) as error:
        problem = f"{path}: cannot be compared with the source: {error}"
        return LayerRow(config.layer_idx, size, recorded, "NOT COMPARED"), problem
    row = LayerRow(config.layer_idx, size, errors, "whole")
    for name, measured in errors.items():
        if not abs(measured - recorded.get(name, -1.0)) <= _SAME:
            problem = (
                f"{path}: relative error of {name} is {measured:.5f}, recorded {recorded.get(name)}: "
                f"{source.path} holds other weights than those that were converted"
            )
            return LayerRow(config.layer_idx, size, errors, "OF OTHER WEIGHTS"), problem
    return row, None


def _measure(
    experts: ExpertWeights, config: MoEConfig, fmt: QuantizedFormat, source: ConvertSource
) -> dict[str, float]:
    matrices = source_matrices(source.experts(config))
    return weight_errors(fmt, experts, matrices, config, sample_experts(config))


def _report(
    path: Path, manifest: Manifest, rows: Sequence[LayerRow], problems: Sequence[str], why: str | None
) -> dict[str, Any]:
    return {
        "whole": not problems,
        "path": str(path),
        "source": manifest.source,
        "source_problem": why,
        "method": manifest.method,
        "group_size": manifest.group_size,
        "problems": list(problems),
        "layers": [
            {
                "layer": row.layer,
                "status": row.status,
                "bytes": row.num_bytes,
                "relative_error": dict(row.relative_error),
            }
            for row in rows
        ],
    }


def _text(
    path: Path, manifest: Manifest, rows: Sequence[LayerRow], problems: Sequence[str], why: str | None
) -> str:
    groups = "" if manifest.group_size is None else f" in groups of {manifest.group_size}"
    title = f"{path}: {manifest.source} with method {manifest.method}{groups}"
    record = next(iter(manifest.layers.values()), None)
    notes = [] if record is None else [note_on_sample(len(record.experts_checked))]
    if why is not None:
        notes.append(wrap(f"Errors are those recorded, as the source cannot be read: {why}"))
    wrong = [wrap(f"WRONG: {problem}") for problem in problems]
    said = f"{counted(len(rows), 'layer')}, every file whole: header, shapes, scales, codes and SHA-256."
    return "\n".join([title, "", render(rows), "", *notes, *(wrong or [said])])
