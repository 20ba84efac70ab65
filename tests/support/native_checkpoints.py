"""Tiny checkpoints of natively quantized experts in every encoding, written without the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoints import write_safetensors
from numpy.typing import NDArray

from ktmoe_np.config import MoEConfig, parse_activation

__all__ = ["ENCODINGS", "LAYER", "Layer", "config_of", "draw_layer", "put_layer"]

AnyArray = NDArray[Any]

LAYER = 5

E4M3 = ml_dtypes.float8_e4m3fn
E8M0 = ml_dtypes.float8_e8m0fnu
BF16 = ml_dtypes.bfloat16


@dataclass
class Matrix:
    """A matrix as its file has it, and as the loader must hand it on."""

    tensors: dict[str, AnyArray]  # by what their names have behind the projection's
    codes: AnyArray  # uint8 [N, row_bytes]; of GPTQ int32 [K / 8, N]
    scale: AnyArray
    factor: float | None = None
    zero: AnyArray | None = None


@dataclass
class Layer:
    """A layer's tensors by name, and its matrices and biases by projection."""

    method: str
    tensors: dict[str, AnyArray] = field(default_factory=dict)
    matrices: dict[str, list[Matrix]] = field(default_factory=dict)
    biases: dict[str, AnyArray] = field(default_factory=dict)
    options: dict[str, Any] | None = None  # that a file beside the tensors says


Draw = Callable[[np.random.Generator, int, int], Matrix]


def _bytes(rng: np.random.Generator, *shape: int) -> AnyArray:
    return rng.integers(0, 256, shape, np.uint8)


def _floats(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> AnyArray:
    values: AnyArray = rng.uniform(0.5, 2, shape).astype(np.float32).astype(dtype)
    return values


def _fp8_block(suffix: str, dtype: Any) -> Draw:
    def draw(rng: np.random.Generator, n: int, k: int) -> Matrix:
        codes, scale = _bytes(rng, n, k), _floats(rng, (-(-n // 128), -(-k // 128)), dtype)
        return Matrix({".weight": codes.view(E4M3), suffix: scale}, codes, scale.astype(np.float32))

    return draw


def _fp8_channel(dtype: Any, *last: int, rows: bool = True) -> Draw:
    def draw(rng: np.random.Generator, n: int, k: int) -> Matrix:
        codes, scale = _bytes(rng, n, k), _floats(rng, (n, *last) if rows else last, dtype)
        wide = np.broadcast_to(scale.astype(np.float32).reshape(-1, 1), (n, 1))
        return Matrix({".weight": codes.view(E4M3), ".weight_scale": scale}, codes, wide)

    return draw


def _groups(codes_name: str, scale_name: str, codes_dtype: Any, scale_dtype: Any, *, bits: int) -> Draw:
    """A byte of scale for 32 codes."""

    def draw(rng: np.random.Generator, n: int, k: int) -> Matrix:
        codes, scale = _bytes(rng, n, k * bits // 8), _bytes(rng, n, k // 32)
        tensors = {codes_name: codes.view(codes_dtype), scale_name: scale.view(scale_dtype)}
        return Matrix(tensors, codes, scale)

    return draw


def _rawint4(dtype: Any) -> Draw:
    def draw(rng: np.random.Generator, n: int, k: int) -> Matrix:
        codes, scale = _bytes(rng, n, k // 2), _floats(rng, (n, k // 32), BF16)
        shape = np.array([n, k], dtype)
        tensors = {".weight_packed": codes.view(np.int32), ".weight_scale": scale, ".weight_shape": shape}
        return Matrix(tensors, codes, scale)

    return draw


def _gptq(group_size: int, dtype: Any, zero: int, *, order: bool = True) -> Draw:
    """A group size of -1 is all of K; `zero` is what is stored for the zero 8."""

    def draw(rng: np.random.Generator, n: int, k: int) -> Matrix:
        size = k if group_size == -1 else group_size
        codes = rng.integers(-(2**31), 2**31, (k // 8, n), np.int32)
        scale = _floats(rng, (-(-k // size), n), BF16).astype(dtype)
        zeros = np.full((len(scale), n // 2), zero * 0x11, np.uint8).view(np.int32)
        tensors = {".qweight": codes, ".scales": scale, ".qzeros": zeros}
        if order:
            tensors[".g_idx"] = (np.arange(k) // size).astype(np.int32)
        return Matrix(tensors, codes, scale.astype(np.float16))

    return draw


def _words(nibbles: AnyArray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> AnyArray:
    """Eight along an axis in a number, in that order from the lowest bits on; filled up with zeros."""
    rows = np.moveaxis(nibbles, axis, -1)
    rows = np.pad(rows, [(0, 0), (0, -rows.shape[-1] % 8)])
    words = np.zeros((len(rows), rows.shape[-1] // 8), np.uint32)
    for place, column in enumerate(order):
        words |= rows[:, column::8].astype(np.uint32) << np.uint32(4 * place)
    return np.ascontiguousarray(np.moveaxis(words.view(np.int32), -1, axis))


Pack = Callable[[AnyArray, AnyArray, AnyArray], dict[str, AnyArray]]


def _zero_points(
    pack: Pack, group_size: int, dtype: Any = np.float16, zeros: tuple[int, int] = (0, 16)
) -> Draw:
    """Nibbles [N, K], scales and zero points [N, G], as `pack` lays them out."""

    def draw(rng: np.random.Generator, n: int, k: int) -> Matrix:
        size = k if group_size == -1 else group_size
        nibbles = rng.integers(0, 16, (n, k)).astype(np.uint8)
        scale = _floats(rng, (n, -(-k // size)), BF16).astype(dtype)
        zero = rng.integers(*zeros, scale.shape).astype(np.uint8)
        codes = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        return Matrix(pack(nibbles, scale, zero), codes, scale, zero=zero)

    return draw


def _pack_awq(nibbles: AnyArray, scale: AnyArray, zero: AnyArray) -> dict[str, AnyArray]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        ".qweight": _words(nibbles.T, 1, order),
        ".qzeros": _words(zero.T, 1, order),
        ".scales": np.ascontiguousarray(scale.T),
    }


def _pack_gptq(version: int) -> Pack:
    def pack(nibbles: AnyArray, scale: AnyArray, zero: AnyArray) -> dict[str, AnyArray]:
        return {
            ".qweight": _words(nibbles.T, 0),
            ".qzeros": _words(zero.T - np.uint8(version == 1) & np.uint8(15), 1),
            ".scales": np.ascontiguousarray(scale.T),
        }

    return pack


def _pack_compressed_tensors(nibbles: AnyArray, scale: AnyArray, zero: AnyArray) -> dict[str, AnyArray]:
    tensors = {
        ".weight_packed": _words(nibbles, 1),
        ".weight_scale": scale,
        ".weight_shape": np.array(nibbles.shape, np.int64),
    }
    return tensors if (zero == 8).all() else {**tensors, ".weight_zero_point": _words(zero, 0)}


def _nvfp4(codes_name: str, factor_name: str, shape: tuple[int, ...]) -> Draw:
    def draw(rng: np.random.Generator, n: int, k: int) -> Matrix:
        codes, scale = _bytes(rng, n, k // 2), _bytes(rng, n, k // 16)
        factor = np.float32(rng.uniform(0.5, 2))
        tensors = {
            codes_name: codes,
            ".weight_scale": scale.view(E4M3),
            factor_name: np.full(shape, factor),
            ".input_scale": np.ones(1, np.float32),
        }
        divides = factor_name == ".weight_global_scale"
        return Matrix(tensors, codes, scale, float(np.float32(1) / factor if divides else factor))

    return draw


#: Encoding -> the method and how a matrix is drawn. All take any of the separate namings.
ENCODINGS: dict[str, tuple[str, Draw]] = {
    "fp8": ("FP8", _fp8_block(".weight_scale_inv", np.float32)),
    "fp8_bf16": ("FP8", _fp8_block(".weight_scale_inv", BF16)),
    "fp8_compressed_tensors": ("FP8", _fp8_block(".weight_scale", np.float32)),
    "fp8_deepseek_v4": ("FP8", _fp8_block(".scale", E8M0)),
    "fp8_channel": ("FP8_PERCHANNEL", _fp8_channel(np.float32, 1)),
    "fp8_channel_bf16": ("FP8_PERCHANNEL", _fp8_channel(BF16)),
    "fp8_tensor": ("FP8_PERCHANNEL", _fp8_channel(np.float32, rows=False)),
    "mxfp8": ("MXFP8", _groups(".weight", ".weight_scale_inv", E4M3, np.uint8, bits=8)),
    "mxfp8_e8m0": ("MXFP8", _groups(".weight", ".weight_scale", E4M3, E8M0, bits=8)),
    "rawint4": ("RAWINT4", _rawint4(np.int64)),
    "rawint4_i32": ("RAWINT4", _rawint4(np.int32)),
    "gptq": ("GPTQ_INT4", _gptq(64, np.float16, 7)),
    "gptq_bf16": ("GPTQ_INT4", _gptq(32, BF16, 7, order=False)),
    "gptq_v2": ("GPTQ_INT4", _gptq(-1, np.float16, 8)),
    "gptq_zeros": ("INT4_ZP", _zero_points(_pack_gptq(1), 64)),
    "gptq_zeros_v2": ("INT4_ZP", _zero_points(_pack_gptq(2), 32, BF16)),
    "awq": ("INT4_ZP", _zero_points(_pack_awq, 32)),
    "awq_128": ("INT4_ZP", _zero_points(_pack_awq, 128)),
    "packed_zeros": ("INT4_ZP", _zero_points(_pack_compressed_tensors, 32, BF16)),
    "packed_zeros_f16": ("INT4_ZP", _zero_points(_pack_compressed_tensors, 128)),
    "packed_channel_zeros": ("INT4_ZP", _zero_points(_pack_compressed_tensors, -1, BF16)),
    "packed_channel": ("INT4_ZP", _zero_points(_pack_compressed_tensors, -1, BF16, (8, 9))),
    "packed_f16": ("INT4_ZP", _zero_points(_pack_compressed_tensors, 32, zeros=(8, 9))),
    "mxfp4_packed": ("MXFP4", _groups(".weight_packed", ".weight_scale", np.uint8, np.uint8, bits=4)),
    "mxfp4_packed_e8m0": ("MXFP4", _groups(".weight_packed", ".weight_scale", np.uint8, E8M0, bits=4)),
    "mxfp4_deepseek_v4": ("MXFP4", _groups(".weight", ".scale", np.int8, E8M0, bits=4)),
    "mxfp4_u8": ("MXFP4", _groups(".weight", ".scale", np.uint8, np.uint8, bits=4)),
    "nvfp4_modelopt": ("NVFP4", _nvfp4(".weight", ".weight_scale_2", ())),
    "nvfp4_packed": ("NVFP4", _nvfp4(".weight_packed", ".weight_global_scale", (1,))),
    "gpt_oss": ("MXFP4", _groups("_blocks", "_scales", np.uint8, np.uint8, bits=4)),
    "step": ("FP8", _fp8_block(".weight_scale_inv", np.float32)),
}

#: Encoding -> GPTQ's options, of files that need them.
OPTIONS: dict[str, dict[str, Any]] = {
    "gptq_zeros": {"bits": 4, "sym": False},
    "gptq_zeros_v2": {"bits": 4, "sym": False, "checkpoint_format": "gptq_v2"},
}

#: Naming -> what stands before an expert's number, and the names of gate, up and down; without a gate of two.
NAMINGS = {
    "qwen": ("model.layers", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("model.layers", "block_sparse_moe.experts", ("w1", "w3", "w2")),
    "kimi": ("language_model.model.layers", "block_sparse_moe.experts", ("w1", "w3", "w2")),
    "kimi_k2": ("language_model.model.layers", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v4": ("layers", "ffn.experts", ("w1", "w3", "w2")),
    "llama4": ("language_model.model.layers", "feed_forward.experts", ("gate_proj", "up_proj", "down_proj")),
    "mixer": ("backbone.layers", "mixer.experts", ("gate_proj", "up_proj", "down_proj")),
    "nemotron": ("backbone.layers", "mixer.experts", ("up_proj", "down_proj")),
}


def config_of(num_experts: int, inter: int, hidden: int, naming: str = "qwen") -> MoEConfig:
    """What a layer of a naming is."""
    activation = parse_activation("relu2" if naming == "nemotron" else "silu")
    return MoEConfig(num_experts, 1, hidden, inter, activation, LAYER)


def draw_layer(
    encoding: str, num_experts: int, inter: int, hidden: int, naming: str = "qwen", *, biases: bool = False
) -> Layer:
    """Draw a layer; `naming` is of no account where the encoding has its own."""
    method, draw = ENCODINGS[encoding]
    layer = Layer(method, options=OPTIONS.get(encoding))
    rng = np.random.default_rng(0)
    projections = (
        ("gate_proj", "down_proj") if naming == "nemotron" else ("gate_proj", "up_proj", "down_proj")
    )
    for projection in projections:
        n, k = (hidden, inter) if projection == "down_proj" else (inter, hidden)
        layer.matrices[projection] = [draw(rng, n, k) for _ in range(num_experts)]
        if biases or encoding == "gpt_oss":
            layer.biases[projection] = _floats(rng, (num_experts, n), BF16)
    if encoding == "gpt_oss":
        _name_gpt_oss(layer)
    elif encoding == "step":
        for projection, matrices in layer.matrices.items():
            for suffix in matrices[0].tensors:
                stacked = np.stack([matrix.tensors[suffix] for matrix in matrices])
                layer.tensors[f"model.layers.{LAYER}.moe.{projection}{suffix}"] = stacked
    else:
        prefix, container, names = NAMINGS[naming]
        for projection, name in zip(projections, names, strict=True):
            for e, matrix in enumerate(layer.matrices[projection]):
                stem = f"{prefix}.{LAYER}.{container}.{e}.{name}"
                layer.tensors |= {stem + suffix: array for suffix, array in matrix.tensors.items()}
                if biases:
                    layer.tensors[f"{stem}.bias"] = layer.biases[projection][e]
    return layer


def _name_gpt_oss(layer: Layer) -> None:
    """Interleave the rows of gate and up, and cut rows of codes into blocks of 16 bytes."""

    def stacked(projection: str, suffix: str) -> AnyArray:
        return np.stack([matrix.tensors[suffix] for matrix in layer.matrices[projection]])

    def interleaved(gate: AnyArray, up: AnyArray) -> AnyArray:
        return np.stack([gate, up], axis=2).reshape(len(gate), 2 * gate.shape[1], *gate.shape[2:])

    stem = f"model.layers.{LAYER}.mlp.experts"
    for suffix in ("_blocks", "_scales"):
        gate_up = interleaved(stacked("gate_proj", suffix), stacked("up_proj", suffix))
        for name, array in (("gate_up_proj", gate_up), ("down_proj", stacked("down_proj", suffix))):
            cut = array.reshape(*array.shape[:2], -1, 16) if suffix == "_blocks" else array
            layer.tensors[f"{stem}.{name}{suffix}"] = cut
    layer.tensors[f"{stem}.gate_up_proj_bias"] = interleaved(
        layer.biases["gate_proj"], layer.biases["up_proj"]
    )
    layer.tensors[f"{stem}.down_proj_bias"] = layer.biases["down_proj"]


def put_layer(directory: Path, layer: Layer) -> Path:
    """Write a layer as a checkpoint of one file, beside a layer without experts."""
    if layer.options is not None:
        (directory / "quantize_config.json").write_text(json.dumps(layer.options))
    path = directory / "model.safetensors"
    other = f"model.layers.{LAYER + 1}.mlp.down_proj.weight"
    shared = f"model.layers.{LAYER}.mlp.shared_experts.down_proj.weight"
    write_safetensors(path, {**layer.tensors, other: np.zeros((2, 2), BF16), shared: np.zeros((2, 2), BF16)})
    return path
