"""Tiny GGUF models of experts in every tensor type, written by the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from struct import pack
from typing import Any

import gguf
import gguf_blocks
import numpy as np
from numpy.typing import NDArray

from ktmoe_np.config import MoEConfig, parse_activation
from ktmoe_np.formats.gguf import GGUF_FORMATS

__all__ = [
    "LAYER",
    "QUANTIZED",
    "RANDOM",
    "GgufLayer",
    "config_of",
    "draw_blocks",
    "draw_layer",
    "raw",
    "raw_key",
    "raw_string",
    "raw_tensor",
    "write",
]

AnyArray = NDArray[Any]

LAYER = 5


def _is_quantized_to(name: str) -> bool:
    """Whether `gguf` quantizes to a type."""
    try:
        gguf.quants.quantize(np.zeros((1, 256), np.float32), gguf.GGMLQuantizationType[name.upper()])
    except NotImplementedError:
        return False
    return True


#: The types that `gguf` quantizes to, and those whose blocks are drawn.
QUANTIZED = tuple(name for name in GGUF_FORMATS if _is_quantized_to(name))
RANDOM = tuple(name for name in GGUF_FORMATS if name not in QUANTIZED)


@dataclass
class GgufLayer:
    """A layer's tensors by name, as (type, bytes [..., row_bytes]), and what the loader must make of them."""

    tensors: dict[str, tuple[str, AnyArray]] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    matrices: dict[str, AnyArray] = field(default_factory=dict)  # projection -> [E, N, row_bytes]
    biases: dict[str, AnyArray] = field(default_factory=dict)


def config_of(num_experts: int, inter: int, hidden: int, activation: str = "silu") -> MoEConfig:
    """What a layer is."""
    return MoEConfig(num_experts, 1, hidden, inter, parse_activation(activation), LAYER)


def draw_blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> AnyArray:
    """Draw weights of a type, as bytes [..., row_bytes]."""
    number = gguf.GGMLQuantizationType[kind.upper()]
    if kind in QUANTIZED:
        weights = rng.standard_normal(shape).astype(np.float32)
        return gguf.quants.quantize(weights, number).view(np.uint8)
    scales = rng.uniform(-0.1, 0.1, (*shape[:-1], shape[-1] // gguf_blocks.GGUF_BLOCKS[kind].block))
    return gguf_blocks.draw_blocks(rng, kind, scales).reshape(*shape[:-1], -1)


def draw_layer(
    kinds: Mapping[str, str] | str,
    num_experts: int,
    inter: int,
    hidden: int,
    naming: str = "stacked",
    *,
    bias: str | None = None,
) -> GgufLayer:
    """Draw a layer; `naming` is stacked, fused, ungated or single (a tensor for each expert).

    `kinds` are the types by projection (gate, up, down), `bias` that of biases.
    """
    rng = np.random.default_rng(0)
    layer = GgufLayer()
    stem = f"blk.{LAYER}.ffn_"
    fused: dict[str, list[AnyArray]] = {"weight": [], "bias": []}
    for role in ("gate", "up", "down"):
        if naming == "ungated" and role == "gate":
            continue
        kind = kinds if isinstance(kinds, str) else kinds[role]
        n, k = (hidden, inter) if role == "down" else (inter, hidden)
        projection = "gate_proj" if naming == "ungated" and role == "up" else f"{role}_proj"
        data = draw_blocks(kind, (num_experts, n, k), rng)
        layer.formats[projection], layer.matrices[projection] = kind, data
        parts = {"weight": (kind, data)}
        if bias is not None:
            rows = draw_blocks(bias, (num_experts, n), rng)
            number = gguf.GGMLQuantizationType[bias.upper()]
            layer.biases[projection] = gguf.quants.dequantize(rows, number).reshape(num_experts, n)
            parts["bias"] = (bias, rows)
        if naming == "single":
            layer.tensors |= {f"{stem}{role}.{e}.weight": (kind, data[e]) for e in range(num_experts)}
            continue
        for suffix, (part_kind, array) in parts.items():
            if naming == "fused" and role != "down":
                fused[suffix].append(array)
                if role == "up":
                    joined = np.concatenate(fused[suffix], axis=1)
                    layer.tensors[f"{stem}gate_up_exps.{suffix}"] = (part_kind, joined)
            else:
                layer.tensors[f"{stem}{role}_exps.{suffix}"] = (part_kind, array)
    return layer


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, AnyArray]],
    metadata: Mapping[str, Any] | None = None,
    *,
    architecture: str = "qwen3moe",
    split: int = 0,
    alignment: int | None = None,
) -> None:
    """Write a model; of more than one file, with so many tensors in each, where `split` is not 0."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def raw(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 0,
) -> bytes:
    """Put a file together byte by byte, for what `gguf` would not write; `counts` are tensors and keys."""
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    header = magic + pack("<IQQ", version, num_tensors, num_keys) + b"".join([*keys, *tensors])
    return header + bytes(-len(header) % 32) + bytes(data)


def raw_string(text: bytes, length: int | None = None) -> bytes:
    """A string with its length, or with a length that lies."""
    return pack("<Q", len(text) if length is None else length) + text


def raw_key(name: bytes, kind: int, value: bytes) -> bytes:
    """A key and its value."""
    return raw_string(name) + pack("<I", kind) + value


def raw_tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """An entry of a tensor; dimensions in the file's order."""
    return raw_string(name) + pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
