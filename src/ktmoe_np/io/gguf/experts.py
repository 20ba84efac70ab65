"""The experts of a layer of a GGUF model, in the blocks of their files, as views of the mapped files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import chosen_experts
from ...arrays.types import IntegersLike
from ...config import MoEConfig
from ...formats.gguf import GGUF_FORMATS, PLAIN_DTYPES
from ...formats.weights import ExpertWeights, Projection
from ..tensor_error import TensorTypeError
from .checkpoint import GgufCheckpoint, GgufTensorInfo, is_gguf
from .config import gguf_config

__all__ = [
    "GgufCheckpoint",
    "GgufTensorInfo",
    "expert_role",
    "gguf_config",
    "gguf_layers",
    "is_gguf",
    "load_gguf",
]

#: Names of experts' weights, those of one expert among them (files of before April 2024).
_NUMBER = "(0|[1-9][0-9]{0,8})"
_WEIGHT = re.compile(rf"blk\.{_NUMBER}\.ffn_(gate|up|gate_up|down)(?:_exps|\.{_NUMBER})\.weight")


def expert_role(name: str) -> str | None:
    """What a tensor's weights are to the experts of its layer: gate, up, gate_up or down; None of others.

    Examples
    --------
    >>> expert_role("blk.3.ffn_gate_up_exps.weight"), expert_role("blk.3.ffn_gate_shexp.weight")
    ('gate_up', None)
    """
    match = _WEIGHT.fullmatch(name)
    return match[2] if match else None


def gguf_layers(checkpoint: GgufCheckpoint | str | os.PathLike[str]) -> tuple[int, ...]:
    """List the layers that have experts, in order.

    Parameters
    ----------
    checkpoint : GgufCheckpoint, str or path-like

    Returns
    -------
    tuple of int

    Raises
    ------
    FileNotFoundError, ValueError
        See `GgufCheckpoint`.

    Examples
    --------
    >>> import gguf, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.gguf")
    >>> writer = gguf.GGUFWriter(path, "deepseek2")
    >>> writer.add_tensor("blk.0.ffn_down.weight", np.zeros((64, 32), np.float16))
    >>> writer.add_tensor("blk.1.ffn_down_exps.weight", np.zeros((2, 64, 32), np.float16))
    >>> writer.write_header_to_file()
    >>> writer.write_kv_data_to_file()
    >>> writer.write_tensors_to_file()
    >>> writer.close()
    >>> gguf_layers(path)
    (1,)
    """
    matches = map(_WEIGHT.fullmatch, GgufCheckpoint.opened(checkpoint).names())
    return tuple(sorted({int(match[1]) for match in matches if match}))


def load_gguf(
    checkpoint: GgufCheckpoint | str | os.PathLike[str],
    layer_idx: int,
    config: MoEConfig,
    experts: IntegersLike | None = None,
) -> ExpertWeights:
    """Find the experts of a layer.

    Weights are never copied; biases are, to float32. A scale per expert beside the blocks
    (``ffn_gate_exps.scale``: the global scale of NVFP4 files) is refused. Gemma's ``ffn_down_exps.scale`` is
    not read: it belongs to the router, whose weights it multiplies. Nor is ``input_scale``, which is for
    kernels that quantize activations.

    Parameters
    ----------
    checkpoint : GgufCheckpoint, str or path-like
        Give a `GgufCheckpoint` when loading more than one layer: it keeps its headers.
    layer_idx : int
        The layer's number in the model.
    config : MoEConfig
        What the whole layer must be; see `gguf_config`.
    experts : array of int, optional
        The experts to load, in this order; None loads all. All headers are checked.

    Returns
    -------
    ExpertWeights
        Each projection with its format.

    Raises
    ------
    FileNotFoundError
        No checkpoint there, or a file of a split model is missing.
    ValueError
        The layer has no experts (names the layers that have); a tensor is missing, of another shape, or of a
        type that is not among those that work, or a scale beside the blocks (names the file and the tensor);
        or the experts are not those that `config` describes. Or `experts` that repeat or are none.
    TypeError, IndexError
        `experts` that are not integers, or not of the layer.

    Examples
    --------
    >>> import gguf, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.gguf")
    >>> writer = gguf.GGUFWriter(path, "qwen3moe")
    >>> q8_0 = gguf.GGMLQuantizationType.Q8_0
    >>> for name, shape in {"gate": (2, 32, 64), "up": (2, 32, 64), "down": (2, 64, 32)}.items():
    ...     blocks = gguf.quants.quantize(np.ones(shape, np.float32), q8_0)
    ...     writer.add_tensor(f"blk.0.ffn_{name}_exps.weight", blocks, raw_dtype=q8_0)
    >>> writer.write_header_to_file()
    >>> writer.write_kv_data_to_file()
    >>> writer.write_tensors_to_file()
    >>> writer.close()
    >>> experts = load_gguf(path, 0, MoEConfig(2, 1, hidden_size=64, moe_intermediate_size=32))
    >>> down = experts.projections["down_proj"]
    >>> down.format, len(down.codes), down.codes[0].shape
    ('q8_0', 2, (64, 34))
    """
    layer = _Layer(GgufCheckpoint.opened(checkpoint), layer_idx, config)
    rows: dict[str, tuple[str, list[NDArray[np.uint8]]]] = {}
    biases: dict[str, NDArray[np.float32]] = {}
    for role in layer.roles:
        format_name, matrices = layer.matrices(role)
        for name, cut in layer.cuts(role):
            rows[name] = format_name, [matrix[cut] for matrix in matrices]
    if any(layer.bias_name(role) in layer.checkpoint for role in layer.roles):
        for role in layer.roles:
            bias = layer.bias(role)
            for name, cut in layer.cuts(role):
                biases[name] = np.ascontiguousarray(bias[:, cut])
    projections = {
        name: Projection(codes, bias=biases.get(name), format=fmt) for name, (fmt, codes) in rows.items()
    }
    weights = ExpertWeights.of(projections, names=tuple(layer.names))
    if experts is None:
        return weights
    chosen = chosen_experts(experts, config.num_experts)
    return replace(weights.select(chosen), names=layer.names_of(chosen))


class _Layer:
    """The tensors of a layer's experts, and reading them with their checks."""

    def __init__(self, checkpoint: GgufCheckpoint, layer_idx: int, config: MoEConfig) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.stem = f"blk.{layer_idx}.ffn_"
        self.names: list[str] = []  # what was read
        numbers: dict[str, set[int | None]] = {}  # role -> the experts that have a tensor; None: all in one
        for name in checkpoint.blocks.get(layer_idx, ()):
            match = _WEIGHT.fullmatch(name)
            if match:
                numbers.setdefault(match[2], set()).add(None if match[3] is None else int(match[3]))
        if not numbers:
            others = ", ".join(map(str, gguf_layers(checkpoint))) or "none"
            raise ValueError(
                f"{checkpoint.path}: layer {layer_idx} has no experts; layers with experts: {others}"
            )
        self.is_stacked = any(None in experts for experts in numbers.values())
        if "gate_up" in numbers:
            self.roles: tuple[str, ...] = ("gate_up", "down")
        else:
            self.roles = ("gate", "up", "down") if "gate" in numbers else ("up", "down")
        self._check_gated(self.roles[0] != "up")
        more = {
            e for experts in numbers.values() for e in experts if e is not None and e >= config.num_experts
        }
        if more and not self.is_stacked:
            name = next(name for role in numbers if (name := self.name(role, max(more))) in checkpoint)
            raise ValueError(
                f"{checkpoint.file_of(name)}: tensor {name!r}: got one, expected {config.num_experts} experts"
            )

    def _check_gated(self, gated: bool) -> None:
        """Raise ValueError when experts have another number of projections than the activation needs."""
        activation = self.config.activation
        if activation.gated != gated:
            raise ValueError(
                f"{self.checkpoint.path}: the experts under {self.stem!r} have {'a' if gated else 'no'} "
                f"gate, but activation {activation.name} is {'not ' if gated else ''}gated"
            )

    def cuts(self, role: str) -> Iterator[tuple[str, slice]]:
        """The projections in a tensor, and their rows: a gate comes first."""
        inter = self.config.moe_intermediate_size
        if role == "gate_up":
            yield "gate_proj", slice(0, inter)
            yield "up_proj", slice(inter, 2 * inter)
        else:
            # The one projection of experts without a gate goes where the gate would.
            is_only = role == "up" and "gate" not in self.roles
            yield "gate_proj" if is_only else f"{role}_proj", slice(None)

    def name(self, role: str, e: int) -> str:
        """A tensor of weights."""
        return f"{self.stem}{role}_exps.weight" if self.is_stacked else f"{self.stem}{role}.{e}.weight"

    def names_of(self, experts: Sequence[int]) -> tuple[str, ...]:
        """What was read of some experts."""
        others = set(range(self.config.num_experts)).difference(experts)
        unread = set() if self.is_stacked else {self.name(role, e) for role in self.roles for e in others}
        return tuple(name for name in self.names if name not in unread)

    def bias_name(self, role: str) -> str:
        """A tensor of biases."""
        return f"{self.stem}{role}_exps.bias"

    def shape(self, role: str) -> tuple[int, int]:
        """N and K of a role's matrices."""
        inter, hidden = self.config.moe_intermediate_size, self.config.hidden_size
        return (hidden, inter) if role == "down" else (inter * (2 if role == "gate_up" else 1), hidden)

    def matrices(self, role: str) -> tuple[str, list[NDArray[np.uint8]]]:
        """View a role's matrices, of one format."""
        num_experts = self.config.num_experts
        lead = (num_experts,) if self.is_stacked else ()
        kinds: list[str] = []
        matrices: list[NDArray[np.uint8]] = []
        for e in range(1 if self.is_stacked else num_experts):
            name = self.name(role, e)
            kinds.append(self._check(name, (*lead, *self.shape(role)), GGUF_FORMATS))
            if kinds[0] != kinds[e]:
                raise TensorTypeError(
                    f"{self.checkpoint.file_of(name)}: tensor {name!r}: got {kinds[e]}, expected "
                    f"{kinds[0]}, as in {self.name(role, 0)!r}: one type for all experts"
                )
            rows = self.checkpoint.tensor(name)
            matrices += list(rows.reshape(-1, self.shape(role)[0], rows.shape[-1]))
        self._check_scale(role, kinds[0])
        return kinds[0], matrices

    def _check_scale(self, role: str, kind: str) -> None:
        """Raise ValueError for a scale per expert: llama.cpp multiplies products by it."""
        name = f"{self.stem}{role}_exps.scale"
        # Beside other types, down's scale is the router's. NVFP4 files have their global scale there.
        if name not in self.checkpoint or (role == "down" and kind != "nvfp4"):
            return
        way_out = "; load the safetensors checkpoint with method NVFP4 instead" if kind == "nvfp4" else ""
        raise ValueError(
            f"{self.checkpoint.file_of(name)}: tensor {name!r}: got a scale per expert beside {kind} blocks, "
            f"expected none{way_out}"
        )

    def bias(self, role: str) -> NDArray[np.float32]:
        """Read a role's biases [E, N]."""
        name = self.bias_name(role)
        shape = (self.config.num_experts, self.shape(role)[0])
        kind = self._check(name, shape, PLAIN_DTYPES)
        return self.checkpoint.tensor(name).view(PLAIN_DTYPES[kind]).reshape(shape).astype(np.float32)

    def _check(self, name: str, shape: tuple[int, ...], formats: Mapping[str, object]) -> str:
        """Raise ValueError when a tensor is not what it must be; otherwise tell its type."""
        if name not in self.checkpoint:
            raise ValueError(f"{self.checkpoint.path}: tensor {name!r}: got none, expected {list(shape)}")
        info = self.checkpoint.info(name)
        where = f"{self.checkpoint.file_of(name)}: tensor {name!r}"
        # Leading dimensions of 1 are not always written.
        padded = (1,) * (len(shape) - len(info.shape)) + info.shape
        if padded != shape:
            expected = f"{list(shape)}{self.config.origin()}"
            raise ValueError(f"{where}: got shape {list(info.shape)}, expected {expected}")
        if info.type not in formats:
            raise TensorTypeError(f"{where}: got {info.type}, expected one of {', '.join(formats)}")
        self.names.append(name)
        return info.type
