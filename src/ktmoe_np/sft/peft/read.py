"""Reading adapters in PEFT's format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...arrays.checks import Array
from ...io import SafetensorsFile
from ...io.gguf.experts import is_gguf
from ..adapted import AdaptedLayer
from ..adapters import shapes_of
from .config import CONFIG_FILE, TENSORS_FILE, PeftConfig, read_peft_config
from .families import FAMILIES, family_of
from .fused import Fused, parted, widened
from .layers import common_scale
from .scale import layer_scale
from .tensors import PeftTensors, peft_tensors, read_fused, read_tensor

__all__ = ["import_peft"]


def import_peft(
    directory: str | os.PathLike[str],
    layers: Sequence[AdaptedLayer],
    *,
    model_type: str | None = None,
    strict: bool = True,
) -> None:
    """Give layers the adapters of a directory that PEFT or `export_peft` wrote.

    Parameters
    ----------
    directory : str or path-like
        With ``adapter_config.json`` and ``adapter_model.safetensors``. Adapters of one Linear per expert have
        names with any prefix before ``layers.{L}.mlp.experts.{e}.gate_proj.lora_A.weight``, or another
        container than ``mlp`` and ``w1``, ``w3`` and ``w2``. Fused adapters are of the parameters
        ``experts.gate_up_proj`` and ``experts.down_proj``. float16 is taken as float32.
    layers : sequence of BaseSFTMoEWrapper
        Of different numbers, with the rank and alpha that `peft_scale` says. Where gate and up share one A,
        both get it.
    model_type : str, optional
        The family, as a config.json names it, which says how fused rows of gate and up lie. None takes that
        of the model that the adapters name, if that is a directory, or of the checkpoint that the layers are
        from.
    strict : bool
        Refuse adapters of modules that are no experts (attention, say), and of layers that are not among
        `layers`: without them the model computes something else. False leaves them alone.

    Raises
    ------
    FileNotFoundError
        No such directory or files.
    ValueError
        Not such files; another rank or scale; an option that changes what adapters compute (rsLoRA, DoRA,
        biases); a tensor that is missing, of another shape or dtype, or of no expert of these layers; fused
        rows of an order that is not known. Names the file, and the tensor or key. All layers keep their
        adapters.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from ktmoe_np import KTMoEWrapper
    >>> from ktmoe_np.sft import export_peft, import_peft
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
    rank, alpha = common_scale(layers)
    source = _peft_directory(directory)
    config = read_peft_config(source / CONFIG_FILE)
    tensors = peft_tensors(SafetensorsFile(source / TENSORS_FILE))
    found = layer_scale(config, tensors)
    for name, got, expected in zip(("r", "lora_alpha"), found, (rank, alpha), strict=True):
        if got != expected:
            raise ValueError(f"{config.path}: {name}: got {got}, expected {expected}, that of the layers")
    if strict:
        _check_all_used(tensors, layers)
    interleaved = bool(tensors.fused) and _interleaved(config, layers, model_type)
    read = [_read_layer(tensors, config, layer, interleaved) for layer in layers]
    for layer, matrices in zip(layers, read, strict=True):
        layer.update_lora_weights(**matrices)


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
        raise ValueError(f"{path}: got a file, expected a directory with {CONFIG_FILE}: {hint}")
    files = sorted(path.glob("*.safetensors"))
    if files and not (path / CONFIG_FILE).exists():
        raise ValueError(f"{path}: got {files[0].name} without {CONFIG_FILE}, expected both: {hint}")
    return path


def _check_all_used(tensors: PeftTensors, layers: Sequence[AdaptedLayer]) -> None:
    """Raise ValueError for adapters that go to none of the layers."""
    numbers = {layer.layer_idx for layer in layers}
    unused = list(tensors.others)
    for layer in sorted(tensors.layers - numbers):
        unused += tensors.names_of(layer)
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise ValueError(
            f"{tensors.file.path}: tensor {unused[0]!r}: got it{more}, expected experts of layers "
            f"{sorted(numbers)} alone: these cannot hold it; strict=False leaves it out"
        )


def _interleaved(config: PeftConfig, layers: Sequence[AdaptedLayer], model_type: str | None) -> bool:
    """Whether fused rows of gate and up alternate.

    Raises
    ------
    ValueError
        Layers whose activation families of both kinds have, and no family.
    """
    known = [x for x in layers if x.weight_path is not None and not is_gguf(x.weight_path)]
    found = family_of(known, model_type, config.base_model)
    if found is None and any(layer.config.activation.kind == "swigluoai" for layer in layers):
        raise ValueError(
            "model_type: got None, expected the family: with activation swigluoai fused rows of gate and up "
            "alternate (gpt_oss) or not (minimax_m3_vl_text)"
        )
    return found in FAMILIES and FAMILIES[found].interleaved


def _read_layer(
    tensors: PeftTensors, config: PeftConfig, layer: AdaptedLayer, interleaved: bool
) -> dict[str, Array]:
    if layer.layer_idx in tensors.fused:
        return _fused_layer(tensors, config, layer, interleaved)
    shapes = shapes_of(layer)
    return {name: _separate_matrices(tensors, layer, name, shape) for name, shape in shapes.items()}


def _separate_matrices(
    tensors: PeftTensors, layer: AdaptedLayer, name: str, shape: tuple[int, int, int]
) -> Array:
    """The matrices of all experts as one array."""
    role, _, matrix = name.split("_")
    roles = (role,) if layer.config.activation.gated or role == "down" else ("gate", "up")
    experts = []
    for expert in range(shape[0]):
        keys = [(layer.layer_idx, expert, each, matrix.upper()) for each in roles]
        missing = f"layers.{layer.layer_idx}.mlp.experts.{expert}.{role}_proj.lora_{matrix.upper()}.weight"
        found = next((tensors.separate[key] for key in keys if key in tensors.separate), None)
        experts.append(read_tensor(tensors.file, found or f"base_model.model.model.{missing}", shape[1:]))
    return np.stack(experts)


def _fused_layer(
    tensors: PeftTensors, config: PeftConfig, layer: AdaptedLayer, interleaved: bool
) -> dict[str, Array]:
    """The adapters of a layer from those of its two parameters."""
    found, rank, number = (
        read_fused(tensors, layer.layer_idx, config),
        layer.options.lora_rank,
        layer.layer_idx,
    )
    c = layer.config
    sizes = len(found.first.a), len(found.down.a), found.first.a.shape[2], found.down.a.shape[2]
    expected = c.num_experts, c.num_experts, c.hidden_size, c.moe_intermediate_size
    if sizes != expected or found.gated != c.activation.gated:
        form = {True: "with a gate", False: "without a gate"}
        raise ValueError(
            f"{tensors.file.path}: layer {number}: got {sizes[0]} and {sizes[1]} experts {form[found.gated]} "
            f"of {sizes[2]} inputs and {sizes[3]} inside, expected {c.num_experts} "
            f"{form[c.activation.gated]} of {c.hidden_size} and {c.moe_intermediate_size}"
        )
    adapters = {"down": widened(found.down, rank)}
    if found.gated:
        both = parted(found.first, rank, interleaved=interleaved)
        if both is None:
            raise ValueError(
                f"{tensors.file.path}: layer {number}: got rank {found.first.rank} of gate and up together, "
                f"expected at most {rank}, or {2 * rank} with B block-diagonal: another model_type "
                "orders its rows otherwise"
            )
        adapters |= dict(zip(("gate", "up"), both, strict=True))
    else:
        adapters["gate"] = widened(found.first, rank)
    return _by_name(adapters)


def _by_name(adapters: dict[str, Fused]) -> dict[str, Array]:
    return {
        f"{role}_lora_{x}": np.ascontiguousarray(matrix)
        for role, adapter in adapters.items()
        for x, matrix in zip("ab", adapter, strict=True)
    }
