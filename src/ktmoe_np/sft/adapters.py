"""Adapters in files: one layer in a file of our own, or several layers as PEFT names them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays.checks import Array
from ..io import SafetensorsFile
from ..io.json_text import read_json_object, shown
from ..io.safetensors.writer import replace_text, write_safetensors
from .adapted import AdaptedLayer
from .gradients import lora_shapes
from .peft_families import LOADED, PeftNames, peft_names

__all__ = ["export_peft", "import_peft", "load_lora_weights", "peft_scale", "save_lora_weights"]

_FORMAT = {"format": "ktmoe_np.lora", "format_version": "1"}

_PEFT_CONFIG, _PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_NAME = "base_model.model.model.layers.{layer}.{experts}.{expert}.{projection}.lora_{matrix}.weight"
_PEFT_PATTERN = re.compile(
    r"(?:.*\.)?layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\."
    r"(gate_proj|up_proj|down_proj|w1|w3|w2)\.lora_(A|B)\.weight"
)
_PEFT_ROLES = {"w1": "gate", "w3": "up", "w2": "down"}

#: The dtypes of a file.
_DTYPES = ("F32", "BF16")
_PEFT_DTYPES = (*_DTYPES, "F16")


# ---- one layer ----


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
    shapes = lora_shapes(layer.config, layer.options.lora_rank)
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


# ---- several layers, as PEFT has them ----


def export_peft(
    directory: str | os.PathLike[str], layers: Sequence[AdaptedLayer], *, model_type: str | None = None
) -> None:
    """Write the adapters of layers of one model in the PEFT format: a directory of two files.

    ``adapter_model.safetensors`` holds ``base_model.model.model.layers.{L}.mlp.experts.{e}.gate_proj.
    lora_A.weight`` [R, H] and so on (of Mixtral and MiniMax ``block_sparse_moe.experts.{e}.w1``),
    ``adapter_config.json`` the rank, the scale and the modules. PEFT applies dropout to no fused experts, so
    the files set it to 0.

    With transformers 5, PEFT loads such adapters for the families of `ktmoe_np.sft.peft_families.LOADED`
    alone: qwen3_moe, qwen3_next, olmoe, flex_olmo, deepseek_v2, deepseek_v3, deepseek_v32, glm4_moe,
    glm4_moe_lite, ernie4_5_moe, hunyuan_v1_moe, exaone_moe, solar_open, cohere2_moe, afmoe, mixtral, minimax
    and minimax_m2. Others are refused; `save_lora_weights` writes the adapters of any layer.

    Parameters
    ----------
    directory : str or path-like
        Made when it is not there; the files are overwritten.
    layers : sequence of BaseSFTMoEWrapper
        Of different numbers, with the same rank and scale.
    model_type : str, optional
        The family, as a config.json names it. None takes that of the checkpoint that the layers are from;
        layers made of arrays are written as those of qwen3_moe.

    Raises
    ------
    ValueError
        No layers, two of the same number, ranks or scales that differ, a layer without adapters, or a family
        of which PEFT does not load them, or is not known to.
    OSError
        A file cannot be written.

    Examples
    --------
    >>> import os, tempfile
    >>> from ktmoe_np import KTMoEWrapper
    >>> layers = [KTMoEWrapper(layer_idx=i, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                        moe_intermediate_size=2, mode="sft", method="AMXBF16_SFT", lora_rank=1)
    ...           for i in range(2)]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     export_peft(directory, layers)
    ...     sorted(os.listdir(directory)), peft_scale(directory)
    (['adapter_config.json', 'adapter_model.safetensors'], (1, 32.0))
    """
    rank, alpha = _common_scale(layers)
    names = peft_names(layers, model_type)
    tensors: dict[str, Array] = {}
    for layer in layers:
        for name, matrices in _adapters_of(layer).items():
            for expert, matrix in enumerate(matrices):
                tensors[_peft_name(names, layer.layer_idx, expert, name)] = matrix
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({getattr(names, name.split("_")[0]) for x in layers for name in _shapes(x)}),
        "layers_to_transform": sorted(layer.layer_idx for layer in layers),
        "layers_pattern": "layers",
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    write_safetensors(target / _PEFT_TENSORS, tensors, {"format": "pt"})
    replace_text(target / _PEFT_CONFIG, json.dumps(config, indent=2) + "\n")


def import_peft(directory: str | os.PathLike[str], layers: Sequence[AdaptedLayer]) -> None:
    """Give layers the adapters of a directory that PEFT or `export_peft` wrote.

    Parameters
    ----------
    directory : str or path-like
        With ``adapter_config.json`` and ``adapter_model.safetensors``. Names may have any prefix before
        ``layers.{L}.mlp.experts.{e}.gate_proj.lora_A.weight``, or ``block_sparse_moe.experts.{e}.w1``;
        adapters of other layers and modules are left alone. float16 is taken as float32.
    layers : sequence of BaseSFTMoEWrapper
        Of different numbers, with the rank and the scale of the adapters.

    Raises
    ------
    FileNotFoundError
        No such directory or files.
    ValueError
        Not such files, another rank or scale, a kind of adapter that is not plain LoRA, or a tensor that is
        missing or of another shape or dtype: names the file, and the tensor or key. All layers keep their
        adapters.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from ktmoe_np import KTMoEWrapper
    >>> trained, fresh = (KTMoEWrapper(layer_idx=0, num_experts=2, num_experts_per_tok=1, hidden_size=4,
    ...                                moe_intermediate_size=2, mode="sft", method="AMXBF16_SFT", lora_rank=1)
    ...                   for _ in range(2))
    >>> trained.update_lora_weights(down_lora_b=np.full((2, 4, 1), 0.25, np.float32))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     export_peft(directory, [trained])
    ...     import_peft(directory, [fresh])
    >>> fresh.lora_weights["down_lora_b"][1].ravel().tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    rank, alpha = _common_scale(layers)
    source = _peft_directory(directory)
    _check_peft_config(source / _PEFT_CONFIG, rank, alpha)
    file = SafetensorsFile(source / _PEFT_TENSORS)
    names = _peft_tensors(file)
    read = [
        {
            name: _peft_matrices(file, names, layer.layer_idx, name, shape)
            for name, shape in _shapes(layer).items()
        }
        for layer in layers
    ]
    for layer, matrices in zip(layers, read, strict=True):
        layer.update_lora_weights(**matrices)


def peft_scale(directory: str | os.PathLike[str]) -> tuple[int, float]:
    """The rank and alpha of adapters that PEFT or `export_peft` wrote: what layers must be made with.

    Parameters
    ----------
    directory : str or path-like
        With ``adapter_config.json``.

    Returns
    -------
    int, float

    Raises
    ------
    FileNotFoundError
        No such directory or file.
    ValueError
        Not such a file, or numbers that are none: names it.
    """
    path = Path(directory) / _PEFT_CONFIG
    config = read_json_object(path)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: r: got {shown(rank)}, expected a positive integer")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"{path}: lora_alpha: got {shown(alpha)}, expected a number")
    return rank, float(alpha)


def _peft_directory(directory: str | os.PathLike[str]) -> Path:
    """The directory, which has the files of PEFT.

    Raises
    ------
    ValueError
        A file, or a directory with files of `save_lora_weights` alone.
    """
    path = Path(directory)
    hint = "load_lora_weights reads a file of save_lora_weights, for one layer"
    if path.is_file():
        raise ValueError(f"{path}: got a file, expected a directory with {_PEFT_CONFIG}: {hint}")
    files = sorted(path.glob("*.safetensors"))
    if files and not (path / _PEFT_CONFIG).exists():
        raise ValueError(f"{path}: got {files[0].name} without {_PEFT_CONFIG}, expected both: {hint}")
    return path


def _common_scale(layers: Sequence[AdaptedLayer]) -> tuple[int, float]:
    """The rank and alpha that all layers have."""
    if not layers:
        raise ValueError("layers: got none, expected one or more")
    numbers = [layer.layer_idx for layer in layers]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"layers: got layer_idx {sorted(numbers)}, expected every number once")
    scales = {(layer.options.lora_rank, layer.options.lora_alpha) for layer in layers}
    if len(scales) != 1:
        raise ValueError(f"layers: got (lora_rank, lora_alpha) {sorted(scales)}, expected the same in all")
    for layer in layers:
        _shapes(layer)
    return scales.pop()


def _peft_name(names: PeftNames, layer: int, expert: int, name: str) -> str:
    role, _, matrix = name.split("_")
    projection = getattr(names, role)
    return _PEFT_NAME.format(
        layer=layer, experts=names.experts, expert=expert, projection=projection, matrix=matrix.upper()
    )


def _check_peft_config(path: Path, rank: int, alpha: float) -> None:
    """Raise ValueError when the adapters are not what the layers are made for."""
    config = read_json_object(path)
    expected: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    plain: dict[str, Any] = dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), False)
    plain |= {"rank_pattern": {}, "alpha_pattern": {}}
    for name, value in expected.items():
        if config.get(name) != value:
            raise ValueError(f"{path}: {name}: got {shown(config.get(name))}, expected {value!r}")
    for name, value in plain.items():
        if config.get(name) not in (value, None):
            raise ValueError(f"{path}: {name}: got {shown(config[name])}, expected {value!r}")


def _peft_tensors(file: SafetensorsFile) -> Mapping[tuple[str, ...], str]:
    """The names of the file's adapters of experts, by layer, expert, role and matrix."""
    names: dict[tuple[str, ...], str] = {}
    for name in file.names():
        found = _PEFT_PATTERN.fullmatch(name)
        if found is not None:
            layer, expert, projection, matrix = found.groups()
            key = layer, expert, _PEFT_ROLES.get(projection, projection.removesuffix("_proj")), matrix
            if key in names:
                raise ValueError(f"{file.path}: tensor {name!r} is there as {names[key]!r} too")
            names[key] = name
    return names


def _peft_matrices(
    file: SafetensorsFile,
    names: Mapping[tuple[str, ...], str],
    layer: int,
    name: str,
    shape: tuple[int, int, int],
) -> Array:
    """The matrices of all experts as one array."""
    projection, _, matrix = name.split("_")
    experts = []
    for expert in range(shape[0]):
        key = (str(layer), str(expert), projection, matrix.upper())
        missing = _peft_name(LOADED["qwen3_moe"], layer, expert, name)
        tensor = _tensor(file, names.get(key, missing), shape[1:], _PEFT_DTYPES)
        experts.append(tensor.astype(np.float32) if tensor.dtype == np.float16 else tensor)
    return np.stack(experts)


# ---- both ----


def _shapes(layer: AdaptedLayer) -> dict[str, tuple[int, int, int]]:
    """The shapes of a layer's adapters, of which there are some."""
    if layer.options.lora_rank == 0:
        raise ValueError(
            f"lora_rank: got 0, expected a layer with adapters: layer {layer.layer_idx} has none"
        )
    return lora_shapes(layer.config, layer.options.lora_rank)


def _adapters_of(layer: AdaptedLayer) -> dict[str, Array]:
    _shapes(layer)
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
