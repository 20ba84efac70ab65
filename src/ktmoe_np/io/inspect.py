"""The experts of a checkpoint, their formats and sizes, from its headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import MoEConfig
from ..config.hf import read_hf_model
from ..formats.activation_blocks import default_in_models, integer_projections
from ..formats.methods import Method, find_method
from ..formats.quantized import FORMATS
from .converted.layer import find_quantized, open_quantized, projection_sizes, quantized_layers
from .converted.manifest import manifest_path, read_manifest
from .experts import find_experts
from .gguf.experts import GgufCheckpoint, gguf_config, gguf_layers, is_gguf, load_gguf
from .json_text import naming_file
from .layer_config import hf_layer_config
from .layouts.encodings import NATIVE_LAYOUTS
from .layouts.layer import layers_with, read_layers, speaks_of_experts
from .layouts.name_patterns import NAME_PATTERNS
from .layouts.native_layer import NativeLayout, find_native_layouts, why_no_layout
from .missing import no_such_path
from .safetensors.checkpoint import SafetensorsCheckpoint, load_hf_config
from .stored_layer import stored_gguf_layer, stored_layer
from .tensor_error import TensorTypeError

__all__ = ["CheckpointReport", "LayerReport", "inspect_checkpoint", "known_templates"]

_PLAIN, _GGUF = "BF16", "LLAMAFILE"


@dataclass(frozen=True)
class LayerReport:
    """The experts of a layer.

    Parameters
    ----------
    config : MoEConfig
        The layer's number, sizes and activation.
    formats : mapping of str to str
        ``gate_proj``, ``up_proj`` when gated and ``down_proj`` -> what the weights are encoded in.
    method : str or None
        The method that `KTMoEWrapper.from_pretrained` takes when it is given none; None when there is none
        for these weights.
    group_size : int or None
        Of files that ``ktmoe convert`` has written: the columns that share a scale.
    num_bytes : int
        Bytes of all experts, scales and biases included, as the files have them.
    problem : str, optional
        Why there is no method: the tensor that has a type which nothing reads, and what was expected.
    """

    config: MoEConfig
    formats: Mapping[str, str]
    method: str | None
    group_size: int | None
    num_bytes: int
    problem: str | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of the experts that one token is sent to."""
        return self.num_bytes * self.config.num_experts_per_tok // self.config.num_experts

    @property
    def int8_projections(self) -> tuple[str, ...]:
        """The projections whose products can take activations in int8."""
        return () if self.method is None else tuple(integer_projections(self.formats))

    @property
    def activation_dtype(self) -> str | None:
        """What a layer takes activations in by default."""
        return None if self.method is None else find_method(self.method, "inference").product

    @property
    def model_activation_dtype(self) -> str | None:
        """What `ktmoe_np.models` takes activations in by default."""
        if self.method is None:
            return None
        return default_in_models(find_method(self.method, "inference"), self.formats)


@dataclass(frozen=True)
class CheckpointReport:
    """The result of `inspect_checkpoint`.

    Parameters
    ----------
    path : Path
    kind : str
        ``safetensors``, ``converted`` (a directory that ``ktmoe convert`` has written) or ``gguf``.
    model_type : str or None
        What the checkpoint calls the kind of model; of GGUF, its architecture.
    architecture : str or None
        The class of the model.
    num_layers : int or None
        Layers of the model, with or without experts.
    layers : tuple of LayerReport
        Those with experts, in order.
    further_layers : tuple of LayerReport
        Layers behind the model's last one, which predict further tokens: no pass over the model reads them.
    """

    path: Path
    kind: str
    model_type: str | None
    architecture: str | None
    num_layers: int | None
    layers: tuple[LayerReport, ...]
    further_layers: tuple[LayerReport, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the experts of `layers`."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of the experts that one token is sent to in all of `layers`."""
        return sum(layer.token_bytes for layer in self.layers)


def inspect_checkpoint(path: str | os.PathLike[str]) -> CheckpointReport:
    """List the experts of a checkpoint.

    Headers are read and checked, as when a layer is loaded; weights are not. A layer with a tensor of a type
    that nothing reads is reported too, with its `LayerReport.problem`.

    Parameters
    ----------
    path : str or path-like
        A directory of Hugging Face safetensors, or one of its files; a directory that ``ktmoe convert`` has
        written; a GGUF file or a directory of one model's.

    Returns
    -------
    CheckpointReport

    Raises
    ------
    FileNotFoundError
        No checkpoint there, or without config.json, or a shard is missing.
    ValueError
        No layer has experts; a file that is damaged, or a layer that is not what the configuration says
        (names the file and the tensor).

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> import ml_dtypes, numpy as np
    >>> from ktmoe_np.io.safetensors.writer import write_safetensors
    >>> path = pathlib.Path(tempfile.mkdtemp())
    >>> config = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 1, "hidden_size": 8,
    ...           "moe_intermediate_size": 8, "num_hidden_layers": 2}
    >>> _ = (path / "config.json").write_text(json.dumps(config))
    >>> names = [f"{e}.{name}_proj" for e in range(4) for name in ("gate", "up", "down")]
    >>> matrix = np.zeros((8, 8), ml_dtypes.bfloat16)
    >>> tensors = {f"model.layers.1.mlp.experts.{name}.weight": matrix for name in names}
    >>> write_safetensors(path / "model.safetensors", tensors)
    >>> report = inspect_checkpoint(path)
    >>> report.num_layers, [layer.config.layer_idx for layer in report.layers]
    (2, [1])
    >>> report.layers[0].method, report.num_bytes, report.token_bytes
    ('BF16', 1536, 384)
    """
    where = Path(path)
    if not where.exists():
        raise no_such_path(where)
    if is_gguf(where):
        return _inspect_gguf(where)
    if manifest_path(where).exists():
        return _inspect_converted(where)
    return _inspect_safetensors(where)


def _report(
    path: Path,
    kind: str,
    about: tuple[str | None, str | None, int | None],
    layers: list[LayerReport],
) -> CheckpointReport:
    """A report of layers, in order; those beyond the number of layers are further ones."""
    num_layers, count = about[2], len(layers)
    if num_layers is not None:
        count = sum(layer.config.layer_idx < num_layers for layer in layers)
    return CheckpointReport(path, kind, *about, tuple(layers[:count]), tuple(layers[count:]))


# ---- Hugging Face safetensors ----


def _inspect_safetensors(path: Path) -> CheckpointReport:
    if quantized_layers(path):
        raise ValueError(
            f"{path}: holds files of quantized layers, but no {manifest_path(path).name} that says for which "
            "method"
        )
    checkpoint = SafetensorsCheckpoint(path)
    config = load_hf_config(path)
    about = read_hf_model(config)
    numbers = layers_with(checkpoint, known_templates())
    if not numbers:
        raise ValueError(_no_experts(checkpoint, about[0]))
    layers = [_safetensors_layer(checkpoint, hf_layer_config(config, number, path)) for number in numbers]
    return _report(path, "safetensors", about, layers)


def known_templates() -> set[str]:
    """The names of experts' tensors, in any format."""
    plain = {name for pattern in NAME_PATTERNS for name in pattern.tensors.values()}
    return plain.union(
        stem + encoding.codes.suffix
        for pattern, encoding in NATIVE_LAYOUTS
        for stem in pattern.tensors.values()
    )


def _no_experts(checkpoint: SafetensorsCheckpoint, model_type: str | None) -> str:
    """Say that no layer has experts, and why that may be."""
    unknown_names = filter(speaks_of_experts, checkpoint.names())
    name = next(unknown_names, None)
    if name is not None:
        return f"{checkpoint.path}: has experts, but under no known tensor names, e.g. {name!r}"
    return f"{checkpoint.path}: no layer has experts: a dense model (model_type {model_type!r})"


def _safetensors_layer(checkpoint: SafetensorsCheckpoint, config: MoEConfig) -> LayerReport:
    layouts = find_native_layouts(checkpoint, config.layer_idx)
    try:
        if layouts:
            return _encoded_layer(checkpoint, config, layouts[0][1])
        if not any(layer.patterns() for layer in read_layers(checkpoint, config.layer_idx)):
            raise TensorTypeError(why_no_layout(checkpoint, config.layer_idx))
        return _numbers_layer(checkpoint, config)
    except TensorTypeError as error:
        stored = stored_layer(checkpoint, config.layer_idx)
        if stored is None:
            raise
        return LayerReport(config, stored.formats, None, None, stored.num_bytes, str(error))


def _encoded_layer(checkpoint: SafetensorsCheckpoint, config: MoEConfig, layout: NativeLayout) -> LayerReport:
    infos = map(checkpoint.info, layout.check(config))
    found = find_method(layout.method, "inference")
    group_size = layout.group_size if found.encodings else None
    formats = dict.fromkeys(projection_sizes(config), found.encodings.get(group_size, found.weights))
    num_bytes = sum(info.end - info.begin for info in infos)
    return LayerReport(config, formats, layout.method, group_size, num_bytes)


def _numbers_layer(checkpoint: SafetensorsCheckpoint, config: MoEConfig) -> LayerReport:
    layer, pattern, sizes = find_experts(checkpoint, config.layer_idx, config)
    infos = map(checkpoint.info, layer.names(pattern, sizes))
    formats = {
        f"{part}_proj": checkpoint.info(layer.name(template, 0)).dtype.lower()
        for role, template in pattern.tensors.items()
        for part in (("gate", "up") if role == "gate_up" else (role,))
    }
    return LayerReport(config, formats, _PLAIN, None, sum(info.end - info.begin for info in infos))


# ---- directories that were converted ----


def _inspect_converted(path: Path) -> CheckpointReport:
    manifest = read_manifest(path)
    with naming_file(manifest_path(path)):
        method = find_method(manifest.method, "inference")
        if not method.formats:
            raise ValueError(f"method: got {manifest.method!r:.80}, expected one that quantizes weights")
        group_size = method.resolve_group_size(manifest.group_size)
    config = load_hf_config(path)
    numbers = sorted({*manifest.layers, *quantized_layers(path)})
    if not numbers:
        raise ValueError(f"{path}: no layer is converted yet")
    layers = [
        _converted_layer(path, hf_layer_config(config, number, path), method, group_size)
        for number in numbers
    ]
    return _report(path, "converted", read_hf_model(config), layers)


def _converted_layer(path: Path, config: MoEConfig, method: Method, group_size: int | None) -> LayerReport:
    fmt = FORMATS[method.formats[group_size]]
    found = find_quantized(path, config.layer_idx)
    if found is None:
        raise FileNotFoundError(f"{path}: none of the layers of {manifest_path(path).name} is there")
    file, _ = open_quantized(found, config, fmt)
    infos = map(file.info, file.names())
    formats = dict.fromkeys(projection_sizes(config), fmt.name)
    return LayerReport(config, formats, method.name, group_size, sum(info.end - info.begin for info in infos))


# ---- GGUF ----


def _inspect_gguf(path: Path) -> CheckpointReport:
    checkpoint = GgufCheckpoint(path)
    numbers = gguf_layers(checkpoint)
    model_type = checkpoint.metadata("general.architecture")
    if not numbers:
        raise ValueError(f"{path}: no layer has experts: a dense model (architecture {model_type!r})")
    layers = [_gguf_layer(checkpoint, gguf_config(checkpoint, number)) for number in numbers]
    num_layers = checkpoint.metadata(f"{model_type}.block_count")
    further = checkpoint.metadata(f"{model_type}.nextn_predict_layers")
    if type(num_layers) is int and type(further) is int:
        num_layers -= further
    about = (model_type, None, num_layers if type(num_layers) is int else None)
    return _report(path, "gguf", about, layers)


def _gguf_layer(checkpoint: GgufCheckpoint, config: MoEConfig) -> LayerReport:
    try:
        experts = load_gguf(checkpoint, config.layer_idx, config)
    except TensorTypeError as error:
        stored = stored_gguf_layer(checkpoint, config.layer_idx)
        return LayerReport(config, stored.formats, None, None, stored.num_bytes, str(error))
    formats = {name: str(projection.format) for name, projection in experts.projections.items()}
    num_bytes = sum(checkpoint.info(name).num_bytes for name in experts.names)
    return LayerReport(config, formats, _GGUF, None, num_bytes)
