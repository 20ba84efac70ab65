"""Adapters of one layer in a safetensors file of our own."""

from __future__ import annotations

import os
from pathlib import Path

from ..arrays.checks import Array
from ..io import SafetensorsFile
from ..io.safetensors.writer import write_safetensors
from .adapted import AdaptedLayer
from .gradients import lora_shapes

__all__ = ["load_lora_weights", "save_lora_weights", "shapes_of"]

_FORMAT = {"format": "ktmoe_np.lora", "format_version": "1"}

#: The dtypes of a file.
_DTYPES = ("F32", "BF16")


def save_lora_weights(path: str | os.PathLike[str], layer: AdaptedLayer) -> None:
    """Write the adapters of a layer to one safetensors file, whose metadata says what they are.

    Parameters
    ----------
    path : str or path-like
        Overwritten when it is there.
    layer : BaseSFTMoEWrapper

    Raises
    ------
    ValueError
        The layer has no adapters.
    OSError
        The file cannot be written.
    """
    write_safetensors(path, _adapters_of(layer), _metadata(layer))


def load_lora_weights(path: str | os.PathLike[str], layer: AdaptedLayer) -> None:
    """Give a layer the adapters that `save_lora_weights` wrote.

    Parameters
    ----------
    path : str or path-like
    layer : BaseSFTMoEWrapper
        Of the same sizes, rank, scale and number.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not such a file, which adapters of PEFT are not (`import_peft` reads those), cut off, or of another
        layer: names the file, and the tensor or what differs. The layer keeps its adapters.
    """
    _adapters_of(layer)
    if Path(path).is_dir():
        hint = "import_peft(directory, layers) reads adapters of PEFT, load_lora_weights a file of one layer"
        raise ValueError(f"{path}: got a directory, expected a file of save_lora_weights: {hint}")
    file = SafetensorsFile(path)
    if "format" in file.metadata and any(".lora_A." in name for name in file.names()):
        hint = f"import_peft({str(file.path.parent)!r}, layers) reads it"
        raise ValueError(f"{file.path}: got adapters of PEFT, expected a file of save_lora_weights: {hint}")
    for name, expected in _metadata(layer).items():
        got = file.metadata.get(name)
        if got != expected:
            raise ValueError(f"{file.path}: {name}: got {got!r}, expected {expected!r}")
    shapes = shapes_of(layer)
    for name in file.names():
        if name not in shapes:
            raise ValueError(f"{file.path}: tensor {name!r}: got one, expected only {', '.join(shapes)}")
    layer.update_lora_weights(**{name: _tensor(file, name, shape, _DTYPES) for name, shape in shapes.items()})


def _metadata(layer: AdaptedLayer) -> dict[str, str]:
    config, options = layer.config, layer.options
    return {
        **_FORMAT,
        "num_experts": str(config.num_experts),
        "hidden_size": str(config.hidden_size),
        "moe_intermediate_size": str(config.moe_intermediate_size),
        "lora_rank": str(options.lora_rank),
        "lora_alpha": repr(options.lora_alpha),
        "layer_idx": str(config.layer_idx),
        "gated": str(config.activation.gated).lower(),
    }


def shapes_of(layer: AdaptedLayer) -> dict[str, tuple[int, int, int]]:
    """The shapes of a layer's adapters, of which there are some."""
    if layer.options.lora_rank == 0:
        raise ValueError(
            f"lora_rank: got 0, expected a layer with adapters: layer {layer.layer_idx} has none"
        )
    return lora_shapes(layer.config, layer.options.lora_rank)


def _adapters_of(layer: AdaptedLayer) -> dict[str, Array]:
    shapes_of(layer)
    return layer.lora_weights


def _tensor(file: SafetensorsFile, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Array:
    """A tensor of the file that is what it should be."""
    info = file.info(name)
    if info.dtype not in dtypes or info.shape != shape:
        raise ValueError(
            f"{file.path}: tensor {name!r}: got {info.dtype} {list(info.shape)}, "
            f"expected {' or '.join(dtypes)} {list(shape)}"
        )
    return file.tensor(name)
