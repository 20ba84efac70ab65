"""The tensors of adapter_model.safetensors: which experts they are of, and fused ones as matrices."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from ...arrays.checks import Array
from ...io import SafetensorsFile
from .config import PeftConfig
from .fused import Fused, unpacked

__all__ = ["FusedLayer", "PeftTensors", "Role", "peft_tensors", "read_fused", "read_tensor"]

Role = Literal["gate", "up", "down"]
_Key = TypeVar("_Key", bound=Hashable)

_DTYPES = ("F32", "BF16", "F16")
_ROLES: dict[str, Role] = {"w1": "gate", "w3": "up", "w2": "down"}

_LAYER = r"(?:.*\.)?layers\.(\d{1,9})\.(?:(?:mlp|block_sparse_moe|ffn|feed_forward|mixer)\.)?experts"
_SEPARATE = re.compile(_LAYER + r"\.(\d{1,9})\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.lora_(A|B)\.weight")
_FUSED = re.compile(_LAYER + r"(\.base_layer)?\.lora_(A|B)\.weight")


@dataclass
class PeftTensors:
    """The names of a file's tensors.

    Attributes
    ----------
    separate : dict
        Layer, expert, name of the projection and matrix (A or B) -> tensor.
    fused : dict
        Layer -> ``base_layer`` (the first parameter) or ``""`` (the last) and matrix -> tensor.
    others : list of str
        Those of no experts.
    """

    file: SafetensorsFile
    separate: dict[tuple[int, int, str, str], str] = field(default_factory=dict)
    fused: dict[int, dict[tuple[str, str], str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def layers(self) -> set[int]:
        """The layers that there are adapters for."""
        return {key[0] for key in self.separate} | self.fused.keys()

    def names_of(self, layer: int) -> list[str]:
        """The tensors of a layer."""
        separate = [name for key, name in self.separate.items() if key[0] == layer]
        return separate + list(self.fused.get(layer, {}).values())


def peft_tensors(file: SafetensorsFile) -> PeftTensors:
    """Sort the names of a file.

    Raises
    ------
    ValueError
        Two tensors for the same matrix: names both.
    """
    found = PeftTensors(file)
    for name in file.names():
        if (match := _SEPARATE.fullmatch(name)) is not None:
            layer, expert, projection, matrix = match.groups()
            projection = _ROLES.get(projection, projection.removesuffix("_proj"))
            _add(file, found.separate, (int(layer), int(expert), projection, matrix), name)
        elif (match := _FUSED.fullmatch(name)) is not None:
            layer, inner, matrix = match.groups()
            _add(file, found.fused.setdefault(int(layer), {}), ((inner or "").lstrip("."), matrix), name)
        else:
            found.others.append(name)
    return found


def _add(file: SafetensorsFile, names: dict[_Key, str], key: _Key, name: str) -> None:
    if key in names:
        raise ValueError(f"{file.path}: tensor {name!r}: got it as {names[key]!r} too, expected one of them")
    names[key] = name


def read_tensor(file: SafetensorsFile, name: str, shape: tuple[int, ...] | None = None) -> Array:
    """A matrix of the file, in float32 or bfloat16.

    Raises
    ------
    KeyError, ValueError
        Missing, or of another dtype or shape: names the file and the tensor.
    """
    info = file.info(name)
    if info.dtype not in _DTYPES or (info.shape != shape if shape else len(info.shape) != 2):
        expected = list(shape) if shape else "matrix"
        raise ValueError(
            f"{file.path}: tensor {name!r}: got {info.dtype} {list(info.shape)}, "
            f"expected {' or '.join(_DTYPES)} {expected}"
        )
    tensor = file.tensor(name)
    return tensor.astype(np.float32) if tensor.dtype == np.float16 else tensor


class FusedLayer(NamedTuple):
    """The adapters of a layer's two parameters, each with the alpha of its rank."""

    first: Fused  #: of gate and up, or of the one projection
    down: Fused
    gated: bool
    swapped: bool
    first_alpha: float
    down_alpha: float


def read_fused(tensors: PeftTensors, layer: int, config: PeftConfig) -> FusedLayer:
    """The adapters of a layer whose tensors are fused.

    Which of two matrices is A is decided by shape: where weights are transposed, PEFT may have taken the
    columns for the rows. Gate and up have twice the rows of the columns of down.

    Raises
    ------
    ValueError
        A tensor that is missing, or shapes that do not fit the ranks or one another.
    """
    names = tensors.fused[layer]
    first_a, first_b = (_fused_name(tensors, names, layer, "base_layer", x) for x in "AB")
    down_a, down_b = (_fused_name(tensors, names, layer, "", x) for x in "AB")
    stem = down_a.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
    matrices = {name: read_tensor(tensors.file, name) for name in (first_a, first_b, down_a, down_b)}
    down_rank, down_alpha = config.scale(f"{stem}.down_proj")
    k, n = matrices[first_a].shape[1], matrices[first_b].shape[0]
    down_k, down_n = matrices[down_a].shape[1], matrices[down_b].shape[0]
    swapped = n == down_k and k == 2 * down_n
    gated = swapped or n != down_k
    if (k, n) not in ((down_n, down_k), (down_n, 2 * down_k), (2 * down_n, down_k)):
        raise ValueError(
            f"{tensors.file.path}: tensor {first_b!r}: got {n} rows and {k} columns of its A beside "
            f"{down_n} and {down_k} of down, expected {2 * down_k} and {down_n}"
        )
    rank, alpha = config.scale(f"{stem}.{'gate_up_proj' if gated else 'up_proj'}")
    for a, b, each in ((first_a, first_b, rank), (down_a, down_b, down_rank)):
        rows, columns = matrices[a].shape[0], matrices[b].shape[1]
        if rows != columns or rows % each:
            raise ValueError(
                f"{tensors.file.path}: tensor {a!r}: got {rows} rows and {columns} columns of its B, "
                f"expected {each} of each expert in both, its rank"
            )
    return FusedLayer(
        unpacked(matrices[first_a], matrices[first_b], rank, swapped=swapped),
        unpacked(matrices[down_a], matrices[down_b], down_rank, swapped=swapped),
        gated,
        swapped,
        alpha,
        down_alpha,
    )


def _fused_name(
    tensors: PeftTensors, names: Mapping[tuple[str, str], str], layer: int, place: str, matrix: str
) -> str:
    if (place, matrix) not in names:
        what = "gate and up" if place else "down"
        raise ValueError(
            f"{tensors.file.path}: layer {layer}: got no lora_{matrix} of {what}, expected adapters of both "
            "experts.gate_up_proj and experts.down_proj"
        )
    return names[place, matrix]
