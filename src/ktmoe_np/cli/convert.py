"""`ktmoe convert`: a model whose experts are quantized to files of their own, layer by layer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..arrays.checks import Array
from ..config import MoEConfig
from ..cpuinfer import _MoEBase
from ..formats.quantized import FORMATS, QuantizedFormat
from ..formats.weights import ExpertWeights
from ..io.converted.layer import (
    check_codes,
    layer_path,
    load_quantized,
    projection_sizes,
    quantized_layers,
    save_quantized,
)
from ..io.converted.manifest import LayerRecord, Manifest, begin_manifest, record_layer
from ..io.converted.rest import Rest
from ..io.safetensors.writer import remove_leftovers
from ..layers.quantize_task import quantize_projection
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


def run(arguments: argparse.Namespace) -> int:
    """Convert the layers that are not converted yet; always 0."""
    method = find_quantizing(arguments.method)
    group_size = method.resolve_group_size(arguments.group_size)
    source, target = Path(arguments.source), Path(arguments.target)
    model = open_source(source, arguments.link)
    layers = _chosen_layers(model, arguments.layers)
    configs = [model.config(layer) for layer in layers]
    manifest = _begin(model, target, Manifest(str(source.resolve()), method.name, group_size))
    model.write_config(target)  # which says what the layers are
    num_steps = sum(_num_matrices(config) + 1 for config in configs) + 1
    with Progress(num_steps, "converting") as progress:
        conversion = _Conversion(
            model, target, FORMATS[method.formats[group_size]], manifest, arguments.threads, progress
        )
        progress.step(f"layer {layers[0]}")
        rows = [conversion.convert(config) for config in configs]
        progress.step("other tensors, tokenizer")
        rest = model.write_rest(target, arguments.link)
    if arguments.json:
        say_json(_report(manifest, target, rows, rest, arguments.link))
    else:
        is_whole = set(manifest.layers) >= set(model.layers())
        about = _about(rest, arguments.link, is_whole)
        say("\n".join([_text(manifest, target, rows, configs), wrap(about)]))
    return 0


class _Conversion:
    """Converts layers."""

    def __init__(
        self,
        model: ConvertSource,
        target: Path,
        fmt: QuantizedFormat,
        manifest: Manifest,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self._model = model
        self._target = target
        self._format = fmt
        self._manifest = manifest
        self._engine = _MoEBase._get_cpu_infer(threads)
        self._progress = progress

    def convert(self, config: MoEConfig) -> LayerRow:
        """Convert a layer, or keep it when it is there already."""
        layer = config.layer_idx
        path = layer_path(self._target, layer)
        source = self._model.experts(config)
        matrices = source_matrices(source)
        record = self._manifest.layers.get(layer)
        if record is not None and self._is_right(path, record, config, matrices):
            self._progress.skip(_num_matrices(config) + 1, f"layer {layer}: there already")
            return LayerRow(layer, path.stat().st_size, record.relative_error, "kept")
        experts = self._quantize(config, source)
        save_quantized(self._target, experts, config, self._format)
        self._check_written(path, experts, config)
        sample = sample_experts(config)
        errors = weight_errors(self._format, experts, matrices, config, sample)
        # Other processes may convert other layers meanwhile; what they have recorded stays.
        made = LayerRecord(file_digest(path), errors, sample)
        record_layer(self._target, self._manifest, layer, made, __version__)
        self._progress.step(f"layer {layer}: written")
        return LayerRow(layer, path.stat().st_size, errors, "written")

    def _quantize(self, config: MoEConfig, source: ExpertWeights) -> ExpertWeights:
        quantized = {}
        for name, size in projection_sizes(config).items():
            shape = (config.num_experts, *size)
            label = f"layer {config.layer_idx}: {name}"
            tell = partial(self._progress.step, label)
            given = source.projections[name]
            made = quantize_projection(self._engine, self._format, label, given.codes, shape, tell)
            quantized[name] = replace(made, bias=given.bias)
        return ExpertWeights.of(quantized)

    def _check_written(self, path: Path, experts: ExpertWeights, config: MoEConfig) -> None:
        """Raise RuntimeError when the contents of the file are not those written."""
        found = load_quantized(path, config, self._format)
        check_codes(path, found, config, self._format)
        for name, projection in experts.projections.items():
            for part, wanted in vars(projection).items():
                if wanted is not None and not _same_bytes(getattr(found.projections[name], part), wanted):
                    raise RuntimeError(f"{path}: '{name}.{part}' does not match what was written")

    def _is_right(self, path: Path, record: LayerRecord, config: MoEConfig, matrices: dict[str, Any]) -> bool:
        """Whether a file is whole, what was written, and what some of the source's experts still give."""
        try:
            found = load_quantized(path, config, self._format)
            check_codes(path, found, config, self._format)
        except (OSError, ValueError):
            return False
        if file_digest(path) != record.sha256:
            return False
        expert = sample_experts(config)[0]
        for name, size in projection_sizes(config).items():
            again = quantize_projection(
                self._engine, self._format, name, [matrices[name][expert]], (1, *size)
            )
            if not np.array_equal(again.codes[0], found.projections[name].codes[expert]):
                return False
        return True


def _chosen_layers(model: ConvertSource, wanted: Sequence[int] | None) -> Sequence[int]:
    """The layers to convert, all of which have experts."""
    there = model.layers()
    if not there:
        raise ValueError(f"{model.path}: no layer has experts under known tensor names")
    for layer in wanted or ():
        if layer not in there:
            known = ", ".join(map(str, there))
            raise ValueError(f"{model.path}: layer {layer} has no experts; layers with experts: {known}")
    return there if wanted is None else sorted(set(wanted))


def _begin(model: ConvertSource, target: Path, manifest: Manifest) -> Manifest:
    """Make the directory, or resume a conversion of the same kind in it."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: got a file, expected a directory")
    where = model.path if model.path.is_dir() else model.path.parent
    if target.exists() and target.samefile(where):
        raise ValueError(f"{target}: got the source, expected a directory of its own for what is converted")
    own = {file.resolve() for file in model.own_files()}
    inside = [file for file in sorted(own) if target.exists() and file.parent == target.resolve()]
    if inside:
        raise ValueError(
            f"{target}: got the source's own {inside[0].name} in it, expected a directory of its own for "
            "what is converted"
        )
    layers = {layer_path(target, i) for i in quantized_layers(target)}
    others = [file for file in sorted({*target.glob("*.safetensors")} - layers) if not model.is_part_of(file)]
    if others:
        raise ValueError(
            f"{target}: got {others[0].name} in it, expected a directory of its own for what is converted"
        )
    target.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    return begin_manifest(target, manifest, __version__)


def _same_bytes(first: Array, second: Array) -> bool:
    """Whether two contiguous arrays hold the same bytes."""
    return first.dtype == second.dtype and np.array_equal(first.view(np.uint8), second.view(np.uint8))


def _num_matrices(config: MoEConfig) -> int:
    return config.num_experts * len(projection_sizes(config))


def _about(rest: Rest, linked: bool, is_whole: bool) -> str:
    """Say where the rest of the model is, and whether the directory is all of it."""
    how = "linked" if linked else "copied"
    runs = (
        "'ktmoe generate', 'eval' and 'finetune' run the directory."
        if is_whole
        else "The directory runs once the other layers are converted too."
    )
    return (
        f"All else that the model needs was {how}: {counted(len(rest.files), 'file')} of "
        f"{rest.num_bytes / 1e6:.3g} MB. {runs}"
    )


def _report(
    manifest: Manifest, target: Path, rows: Sequence[LayerRow], rest: Rest, linked: bool
) -> dict[str, Any]:
    return {
        "source": manifest.source,
        "target": str(target),
        "method": manifest.method,
        "group_size": manifest.group_size,
        "layers": [
            {
                "layer": row.layer,
                "status": row.status,
                "bytes": row.num_bytes,
                "relative_error": dict(row.relative_error),
                "experts_checked": list(manifest.layers[row.layer].experts_checked),
            }
            for row in rows
        ],
        "rest": {"files": list(rest.files), "bytes": rest.num_bytes, "linked": linked},
    }


def _text(manifest: Manifest, target: Path, rows: Sequence[LayerRow], configs: Sequence[MoEConfig]) -> str:
    weights = sum(
        config.num_experts * np.prod(size, dtype=float)
        for config in configs
        for size in projection_sizes(config).values()
    )
    num_bytes = sum(row.num_bytes for row in rows)
    num_kept = sum(row.status == "kept" for row in rows)
    groups = "" if manifest.group_size is None else f" in groups of {manifest.group_size}"
    said = (
        f"{counted(len(rows), 'layer')} in {target}, {num_bytes / 1e6:.3g} MB, {8 * num_bytes / weights:.2f} "
        f"bits per weight; {num_kept} of them were there already. Load them with "
        f"weight_path={str(target)!r}, method={manifest.method!r}."
    )
    checked = len(manifest.layers[rows[0].layer].experts_checked)
    title = f"{manifest.source} with method {manifest.method}{groups}"
    notes = [
        note_on_sample(checked),
        "Every file was read back and compared.",
        wrap(said),
    ]
    return "\n".join([title, "", render(rows), "", *notes])
