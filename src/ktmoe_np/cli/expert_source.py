"""Sources of the matrices of a layer's experts for the reference: numbers, or a checkpoint's encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..arrays.checks import Array
from ..config import MoEConfig
from ..formats.encodings import NATIVE_FORMATS
from ..formats.methods import find_method
from ..formats.quantized import FORMATS, QuantizedFormat
from ..formats.weights import ExpertWeights
from ..io import SafetensorsCheckpoint, load_experts
from ..io.gguf.experts import GgufCheckpoint, gguf_config, gguf_layers, is_gguf, load_gguf
from ..io.inspect import known_templates
from ..io.layer_config import layer_config
from ..io.layouts.layer import layers_with
from ..io.mapped import MappedFiles
from ..io.native import load_native, native_method
from ..reference import decode_gguf, integers_of_gguf
from ..reference.gguf import BLOCK_TYPES
from ..reference.integer_encodings import INTEGERS
from ..reference.native import DECODERS
from .arguments import Dtype
from .quantized_reference import quantize_matrices

__all__ = ["ExpertSource", "GgufSource", "Layer", "NativeSource", "TensorSource", "open_layer"]


class ExpertSource(Protocol):
    """The experts of a layer for the reference, only those requested.

    All experts of a layer, decoded, may not fit in memory.
    """

    def arguments(self, experts: Sequence[int]) -> dict[str, Any]:
        """Arguments of `moe_forward` for these experts: weights, biases, and the product where it matters."""


@dataclass(frozen=True, eq=False)
class TensorSource:
    """Weights in bfloat16, quantized where the method quantizes them.

    Parameters
    ----------
    tensors : ExpertWeights
    fmt : QuantizedFormat, optional
        What the weights are quantized to before they are used.
    product : str
        Of `moe_forward`.
    activation_dtype : str, optional
        Likewise.
    """

    tensors: ExpertWeights
    fmt: QuantizedFormat | None = None
    product: str = "bfloat16"
    activation_dtype: Dtype = None

    def arguments(self, experts: Sequence[int]) -> dict[str, Any]:
        """See `ExpertSource`."""
        made: dict[str, Any] = {"up_proj": None, **_biases(self.tensors.biases, experts)}
        made |= {"product": self.product, "activation_dtype": self.activation_dtype}
        for name, projection in self.tensors.projections.items():
            made[name] = self._encoded([projection.codes[e] for e in experts])
        return made

    def _encoded(self, matrices: list[Array]) -> Any:
        MappedFiles(matrices).check()
        return matrices if self.fmt is None else quantize_matrices(self.fmt, np.stack(matrices))


@dataclass(frozen=True, eq=False)
class NativeSource:
    """Codes and scales of a Hugging Face checkpoint."""

    experts: ExpertWeights
    activation_dtype: Dtype = None

    def arguments(self, experts: Sequence[int]) -> dict[str, Any]:
        """See `ExpertSource`."""
        assert self.experts.method is not None
        assert self.experts.group_size is not None
        in_int8 = self.activation_dtype == "int8"
        decode = (INTEGERS if in_int8 else DECODERS)[self.experts.method]
        made: dict[str, Any] = {"up_proj": None, **_biases(self.experts.biases, experts)}
        made["activation_dtype"] = self.activation_dtype
        for name, projection in self.experts.projections.items():
            assert projection.scales is not None
            MappedFiles([projection.codes, projection.scales]).check()
            codes = np.stack([projection.codes[e] for e in experts])
            scale = np.stack([projection.scales[e] for e in experts])
            extra = projection.global_scale
            if projection.zero_points is not None:
                extra = np.stack([projection.zero_points[e] for e in experts])
            elif extra is not None:
                extra = extra[experts]
            made[name] = decode(codes, scale, extra, self.experts.group_size)
        return made


@dataclass(frozen=True, eq=False)
class GgufSource:
    """Blocks of a GGUF model; each projection has its own type."""

    experts: ExpertWeights
    activation_dtype: Dtype = None

    def arguments(self, experts: Sequence[int]) -> dict[str, Any]:
        """See `ExpertSource`."""
        made: dict[str, Any] = {"up_proj": None, **_biases(self.experts.biases, experts)}
        for name, projection in self.experts.projections.items():
            MappedFiles([projection.codes]).check()
            blocks, fmt = np.stack([projection.codes[e] for e in experts]), str(projection.format)
            in_int8 = self.activation_dtype == "int8" and fmt in BLOCK_TYPES
            made[name] = integers_of_gguf(blocks, fmt) if in_int8 else decode_gguf(blocks, fmt)
        return made | {"activation_dtype": self.activation_dtype}


def _biases(biases: Mapping[str, Array], experts: Sequence[int]) -> dict[str, Array]:
    return {f"{name.removesuffix('_proj')}_bias": bias[experts] for name, bias in biases.items()}


# ---- finding it ----


class Layer(NamedTuple):
    """A layer of a checkpoint, and what the reference is to make of its experts."""

    config: MoEConfig
    experts: ExpertSource


def open_layer(
    path: Path, layer_idx: int | None, method: str | None, activation_dtype: Dtype = None
) -> Layer:
    """Find a layer, and what its experts are to `method`, as `KTMoEWrapper.from_pretrained` does.

    Parameters
    ----------
    path : Path
        Of a Hugging Face checkpoint or of a GGUF model.
    layer_idx : int, optional
        None takes the first layer with experts.
    method : str, optional
        Of mode ``inference``; None takes what the layer is encoded in.
    activation_dtype : str, optional
        One that the layer has; None takes the method's own.

    Raises
    ------
    FileNotFoundError
        No checkpoint there, or without config.json, or a shard is missing.
    ValueError
        An unknown method, or one for weights in another encoding; a layer without experts, or with others
        than the configuration says.
    """
    opened = _open_gguf if is_gguf(path) else _open_safetensors
    return opened(path, layer_idx, method, activation_dtype)


def _open_gguf(path: Path, layer_idx: int | None, method: str | None, dtype: Dtype) -> Layer:
    if find_method(method or "LLAMAFILE", "inference").weights != "gguf":
        raise ValueError(f"method: got {method!r}, expected 'LLAMAFILE': {path} is GGUF")
    checkpoint = GgufCheckpoint.shared(path)
    layer = _choose(path, gguf_layers(checkpoint), layer_idx)
    config = gguf_config(checkpoint, layer)
    return Layer(config, GgufSource(load_gguf(checkpoint, layer, config), dtype))


def _open_safetensors(path: Path, layer_idx: int | None, method: str | None, dtype: Dtype) -> Layer:
    find_method(method, "inference")  # an unknown one is told before the files are looked at
    checkpoint = SafetensorsCheckpoint.shared(path)
    layer = _choose(path, layers_with(checkpoint, known_templates()), layer_idx)
    config = layer_config(path, layer)
    native = native_method(checkpoint, layer)
    found = find_method(method or native, "inference")
    if found.weights == "gguf":
        raise ValueError(f"method: got {method!r}, which reads GGUF: {path} is none")
    if found.weights in NATIVE_FORMATS:
        return Layer(config, NativeSource(load_native(checkpoint, layer, config, found.name), dtype))
    if native is not None:
        raise ValueError(
            f"{path}: the experts of layer {layer}: got {native}, "
            f"expected bfloat16 with method {found.name!r}"
        )
    fmt = found.formats.get(found.resolve_group_size(None))
    tensors = load_experts(checkpoint, layer, config)
    quantized = None if fmt is None else FORMATS[fmt]
    return Layer(config, TensorSource(tensors, quantized, found.product, dtype))


def _choose(path: Path, layers: Sequence[int], layer_idx: int | None) -> int:
    """The requested layer, or the first; where no layer is known, the loader raises."""
    if layer_idx is None:
        if not layers:
            raise ValueError(f"{path}: no layer has experts under known tensor names")
        return layers[0]
    if layers and layer_idx not in layers:
        known = ", ".join(map(str, layers))
        raise ValueError(
            f"{path}: layer {layer_idx} has no experts under known tensor names; layers with experts: {known}"
        )
    return layer_idx
