"""Files of quantized experts, one per layer: written atomically, checked field by field, mapped without copy.

``layer-00012.safetensors`` holds ``gate_proj.codes`` U8 [E, I, row_bytes], ``gate_proj.row_scale`` F32 [E, I]
where the format has channel scales, ``gate_proj.bias`` F32 [E, I] where there are biases, and ``up_proj`` and
``down_proj`` likewise; its metadata says what they are. The bytes depend on the weights alone. ``row_scale``
is the channel scale: the name in the file stays, so that files written earlier still load.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import chosen_experts
from ...arrays.types import IntegersLike
from ...config import MoEConfig
from ...formats.quantized import QuantizedFormat
from ...formats.weights import ExpertWeights, Projection
from ..layouts.layer import aligned, expert_layers
from ..mapped import MappedFiles
from ..safetensors.checkpoint import SafetensorsCheckpoint, SafetensorsFile
from ..safetensors.writer import write_safetensors

__all__ = [
    "check_codes",
    "check_not_quantized",
    "find_quantized",
    "layer_path",
    "load_quantized",
    "open_quantized",
    "projection_sizes",
    "quantized_layers",
    "save_quantized",
]

AnyArray = NDArray[Any]

_FORMAT = {"format": "ktmoe-quantized", "version": "1"}
_FILE_NAME = re.compile(r"layer-([0-9]{5,9})\.safetensors")


def projection_sizes(config: MoEConfig) -> dict[str, tuple[int, int]]:
    """N and K of the projections that a layer has."""
    first = (config.moe_intermediate_size, config.hidden_size)
    names = ("gate_proj", "up_proj") if config.activation.gated else ("gate_proj",)
    return {**dict.fromkeys(names, first), "down_proj": first[::-1]}


def layer_path(directory: str | os.PathLike[str], layer_idx: int) -> Path:
    """The file of a layer.

    Examples
    --------
    >>> layer_path("model", 12).name
    'layer-00012.safetensors'
    """
    return Path(directory) / f"layer-{layer_idx:05}.safetensors"


def quantized_layers(directory: str | os.PathLike[str]) -> tuple[int, ...]:
    """List the layers that have a file in a directory, in order."""
    path = Path(directory)
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    return tuple(sorted(int(found[1]) for found in map(_FILE_NAME.fullmatch, names) if found))


def find_quantized(path: str | os.PathLike[str], layer_idx: int) -> Path | None:
    """The file of a layer in a directory of such files, or `path` itself if it is one.

    Returns
    -------
    Path, or None when it is another kind of checkpoint

    Raises
    ------
    FileNotFoundError
        A directory of such files, but without this layer.
    """
    where = Path(path)
    if _FILE_NAME.fullmatch(where.name) and where.is_file():
        return where
    layers = quantized_layers(where)
    if not layers:
        return None
    file = layer_path(where, layer_idx)
    if layer_idx not in layers:
        there = ", ".join(map(str, layers))
        raise FileNotFoundError(f"{file}: no such file; layers that are there: {there}")
    return file


def check_not_quantized(path: str | os.PathLike[str], method: str) -> None:
    """Raise ValueError for such a file, or a directory of them without other experts: nothing to read."""
    where = Path(path)
    layers = quantized_layers(where)
    has_experts = len(layers) < len(list(where.glob("*.safetensors"))) and bool(
        expert_layers(SafetensorsCheckpoint.shared(where))
    )
    if (layers and not has_experts) or (_FILE_NAME.fullmatch(where.name) and where.is_file()):
        raise ValueError(f"{where}: holds quantized weights, which method {method!r} does not read")


def save_quantized(
    directory: str | os.PathLike[str], experts: ExpertWeights, config: MoEConfig, fmt: QuantizedFormat
) -> Path:
    """Write the file of a layer; one that is there is replaced, all at once.

    Parameters
    ----------
    directory : str or path-like
        Made when it is not there.
    experts : ExpertWeights
    config : MoEConfig
        What the layer is.
    fmt : QuantizedFormat
        What its rows are.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    tensors: dict[str, AnyArray] = {}
    for name in projection_sizes(config):
        projection = experts.projections[name]
        tensors[f"{name}.codes"] = _stacked(projection.codes)
        if projection.channel_scale is not None:
            tensors[f"{name}.row_scale"] = _stacked(projection.channel_scale)
        if projection.bias is not None:
            tensors[f"{name}.bias"] = np.asarray(projection.bias).astype(np.float32)
    path = layer_path(directory, config.layer_idx)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, tensors, _metadata(config, fmt, experts.biases))
    return path


def load_quantized(
    path: str | os.PathLike[str],
    config: MoEConfig,
    fmt: QuantizedFormat,
    experts: IntegersLike | None = None,
) -> ExpertWeights:
    """Map the file of a layer, when it is what it should be.

    Header and scales are checked; codes are not read: `check_codes` does.

    Parameters
    ----------
    path : str or path-like
        The file.
    config : MoEConfig
        What the whole layer must be.
    fmt : QuantizedFormat
        What its rows must be.
    experts : array of int, optional
        The experts to load, in this order; None loads all.

    Returns
    -------
    ExpertWeights
        Views of the mapped file.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not such a file, cut off, or of another layer: names the file, and the field or tensor, what came and
        what was expected. Or `experts` that repeat or are none.
    TypeError, IndexError
        `experts` that are not integers, or not of the layer.
    """
    file, biased = open_quantized(path, config, fmt)
    projections = {
        name: Projection(
            file.tensor(f"{name}.codes"),
            channel_scale=aligned(file.tensor(f"{name}.row_scale")) if fmt.has_channel_scale else None,
            bias=aligned(file.tensor(f"{name}.bias")) if name in biased else None,
        )
        for name in projection_sizes(config)
    }
    weights = ExpertWeights.of(projections)
    chosen: Sequence[int] = range(config.num_experts)
    if experts is not None:
        chosen = chosen_experts(experts, config.num_experts)
        weights = weights.select(chosen)
    _check_scales(file, weights, chosen)
    return weights


def open_quantized(
    path: str | os.PathLike[str], config: MoEConfig, fmt: QuantizedFormat
) -> tuple[SafetensorsFile, list[str]]:
    """Open the file of a layer and check its header, which is all that is read.

    Returns
    -------
    file : SafetensorsFile
    biased : list of str
        The projections that have a bias.

    Raises
    ------
    FileNotFoundError, ValueError
        Those of `load_quantized`, but for its scales.
    """
    file = SafetensorsFile(path)
    biased = [name for name in projection_sizes(config) if f"{name}.bias" in file]
    expected = {"scale_inputs": "false", **_metadata(config, fmt, biased)}
    if "scale_inputs" not in file.metadata:
        del expected["scale_inputs"]  # said only where it is true, and not by earlier versions
    _check_metadata(file, expected)
    wanted = dict(_wanted(config, fmt, biased))
    for name, (dtype, shape) in wanted.items():
        if name not in file:
            raise ValueError(f"{file.path}: tensor {name!r}: got none, expected {dtype} {list(shape)}")
        info = file.info(name)
        if info.dtype != dtype or info.shape != shape:
            raise ValueError(
                f"{file.path}: tensor {name!r}: got {info.dtype} {list(info.shape)}, "
                f"expected {dtype} {list(shape)}"
            )
    for name in file.names():
        if name not in wanted:
            raise ValueError(f"{file.path}: tensor {name!r}: got one, expected only {', '.join(wanted)}")
    return file, biased


def check_codes(
    path: str | os.PathLike[str], experts: ExpertWeights, config: MoEConfig, fmt: QuantizedFormat
) -> None:
    """Read all codes of a file that `load_quantized` has mapped.

    Raises
    ------
    ValueError
        Codes, multipliers or scales that no quantized weights have: names the file, the tensor, the expert
        and the row.
    OSError
        The file was cut off since it was mapped.
    """
    for name, (_, num_columns) in projection_sizes(config).items():
        for e, codes in enumerate(experts.projections[name].codes):
            MappedFiles([codes]).check()
            problem = fmt.problem(codes, num_columns)
            if problem is not None:
                raise ValueError(f"{path}: tensor '{name}.codes': expert {e}, {problem}")


def _metadata(config: MoEConfig, fmt: QuantizedFormat, biased: Any) -> dict[str, str]:
    """The metadata of a file."""
    spec = config.activation
    parameters = (f"{name}={getattr(spec, name)!r}" for name in ("limit", "alpha", "beta1", "beta2"))
    return {
        **_FORMAT,
        "layer_idx": str(config.layer_idx),
        **{f"{name}.format": fmt.name for name in projection_sizes(config)},
        "group_size": str(fmt.group_size or "none"),
        "num_experts": str(config.num_experts),
        "hidden_size": str(config.hidden_size),
        "moe_intermediate_size": str(config.moe_intermediate_size),
        "activation": " ".join([spec.name, *parameters]),
        "biases": " ".join(name for name in projection_sizes(config) if name in biased) or "none",
        **({"scale_inputs": "true"} if config.scale_inputs else {}),
    }


def _check_metadata(file: SafetensorsFile, expected: Mapping[str, str]) -> None:
    for name, value in expected.items():
        got = file.metadata.get(name)
        if got is None:
            raise ValueError(f"{file.path}: {name}: got none in the metadata, expected {value!r}")
        if got != value:
            raise ValueError(f"{file.path}: {name}: got {got!r:.80}, expected {value!r}")
    for name in file.metadata:
        if name not in expected:
            raise ValueError(
                f"{file.path}: {name!r:.80}: got one in the metadata, expected only {', '.join(expected)}"
            )


def _wanted(
    config: MoEConfig, fmt: QuantizedFormat, biased: list[str]
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Dtype and shape of the tensors of a file."""
    for name, (num_rows, num_columns) in projection_sizes(config).items():
        rows = (config.num_experts, num_rows)
        yield f"{name}.codes", ("U8", (*rows, fmt.row_bytes(num_columns)))
        if fmt.has_channel_scale:
            yield f"{name}.row_scale", ("F32", rows)
        if name in biased:
            yield f"{name}.bias", ("F32", rows)


def _check_scales(file: SafetensorsFile, weights: ExpertWeights, experts: Sequence[int]) -> None:
    """Raise ValueError for a scale of these experts that is not finite."""
    for name, projection in weights.projections.items():
        if projection.channel_scale is None:
            continue
        for e, scale in zip(experts, projection.channel_scale, strict=True):
            wrong = ~np.isfinite(scale)
            if wrong.any():
                row = int(np.argmax(wrong))
                raise ValueError(
                    f"{file.path}: tensor '{name}.row_scale': expert {e}, row {row}: got {scale[row]}, "
                    "expected finite scales"
                )


def _stacked(source: Any) -> AnyArray:
    return np.stack(source) if isinstance(source, list | tuple) else np.asarray(source)
