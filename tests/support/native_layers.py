"""Layers in the encodings that checkpoints come in, and what the reference decodes them to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from gguf_blocks import GGUF_BLOCKS, draw_blocks
from layers import Layer, bf16, draw_layer

from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.config import parse_activation
from ktmoe_np.formats.gguf import GGUF_FORMATS
from ktmoe_np.reference import (
    decode_fp8,
    decode_fp8_perchannel,
    decode_gguf,
    decode_gptq_int4,
    decode_int4_zp,
    decode_mxfp4,
    decode_mxfp8,
    decode_nvfp4,
    decode_rawint4,
    integers_of_gguf,
)
from ktmoe_np.reference.integer_encodings import INTEGERS

__all__ = [
    "IN_PLACE",
    "METHODS",
    "WITH_SCALES",
    "NativeLayer",
    "draw_gguf",
    "draw_native_layer",
]

AnyArray = Any
Drawn = tuple[dict[str, AnyArray], Any]  # arguments behind the projection's name, and the decoded matrices


@dataclass(frozen=True)
class NativeLayer(Layer):
    """A layer whose matrices are decoded ones, which is loaded from what they were decoded from."""

    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return int(self.down_proj.shape[0])

    def load_into(self, moe: Any, physical_to_logical_map: Any = None) -> None:
        moe.load_weights_from_tensors(
            physical_to_logical_map=physical_to_logical_map, **self.arguments, **self.biases
        )

    def with_integers(self, method: str, group_size: int = 32) -> Layer:
        """The layer of the reference whose products take int8 activations.

        Projections that stay in bfloat16, those in plain floats, keep their decoded matrices.
        """
        matrices = {
            f"{name}_proj": self._integers(method, name, group_size)
            for name in ("gate", "up", "down")
            if self.arguments.get(f"{name}_proj") is not None
        }
        model = {"activation": self.activation, "scale_inputs": self.scale_inputs}
        return Layer(**{"up_proj": None, **matrices}, **self.biases, **model)

    def _integers(self, method: str, name: str, group_size: int) -> Any:
        codes = self.arguments[f"{name}_proj"]
        if method == "LLAMAFILE":
            type_name = self.arguments[f"{name}_format"].lower()
            has_blocks = type_name in GGUF_BLOCKS
            return integers_of_gguf(codes, type_name) if has_blocks else getattr(self, f"{name}_proj")
        scale, extra = self.arguments.get(f"{name}_scale"), self.arguments.get(f"{name}_global_scale")
        extra = self.arguments.get(f"{name}_zero", extra)
        if method != "GPTQ_INT4":
            codes = codes.view(np.uint8)
        found = INTEGERS[method](codes, scale, extra, group_size)
        num_columns = self.hidden_size if name != "down" else self.inter_size
        return replace(found, codes=found.codes[..., :num_columns])  # without the unused nibble of odd rows


def _e4m3(rng: np.random.Generator, *shape: int) -> AnyArray:
    """Any bytes but those of NaN."""
    codes = rng.integers(0, 256, shape, np.uint8)
    return np.where(codes & 127 == 127, codes & 0x83, codes).astype(np.uint8)


def _powers(rng: np.random.Generator, typical: float, *shape: int) -> AnyArray:
    return (127 + round(np.log2(typical)) + rng.integers(-1, 2, shape)).astype(np.uint8)


def _scales(rng: np.random.Generator, typical: float, *shape: int) -> AnyArray:
    return (typical * rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)).astype(np.float32)


def _fp8(rng: np.random.Generator, size: float, e: int, n: int, k: int) -> Drawn:
    codes, scale = _e4m3(rng, e, n, k), _scales(rng, size / 150, e, -(-n // 128), -(-k // 128))
    return {"proj": codes.view(ml_dtypes.float8_e4m3fn), "scale": scale}, decode_fp8(codes, scale)


def _fp8_perchannel(rng: np.random.Generator, size: float, e: int, n: int, k: int) -> Drawn:
    codes, scale = _e4m3(rng, e, n, k), _scales(rng, size / 150, e, n)
    return {"proj": codes, "scale": scale}, decode_fp8_perchannel(codes, scale)


def _mxfp8(rng: np.random.Generator, size: float, e: int, n: int, k: int) -> Drawn:
    codes, scale = _e4m3(rng, e, n, k), _powers(rng, size / 150, e, n, -(-k // 32))
    return {"proj": codes, "scale": scale}, decode_mxfp8(codes, scale)


def _nibbles(rng: np.random.Generator, e: int, n: int, k: int) -> AnyArray:
    return rng.integers(0, 256, (e, n, -(-k // 2)), np.uint8)


def _rawint4(rng: np.random.Generator, size: float, e: int, n: int, k: int) -> Drawn:
    codes, scale = _nibbles(rng, e, n, k), _scales(rng, size / 4.6, e, n, -(-k // 32)).astype(bf16)
    given = codes.view(np.int32) if codes.shape[-1] % 4 == 0 else codes
    return {"proj": given, "scale": scale}, decode_rawint4(codes, scale, k)


def _gptq_int4(rng: np.random.Generator, size: float, e: int, n: int, k: int) -> Drawn:
    """Groups of one of the sizes that there are, and scales in either dtype."""
    group_size = int(rng.choice([32, 64, 128, k]))
    codes = rng.integers(-(2**31), 2**31, (e, k // 8, n), np.int32)
    scale = _scales(rng, size / 4.6, e, -(-k // group_size), n)
    scale = scale.astype((np.float16, bf16)[rng.integers(2)])
    return {"proj": codes, "scale": scale}, decode_gptq_int4(codes, scale)


def _int4_zp(rng: np.random.Generator, size: float, e: int, n: int, k: int, block: int = 32) -> Drawn:
    """Likewise, in groups that a block divides, and zero points from 0 to 16."""
    group_size = int(rng.choice([group for group in (32, 64, 128, k) if group % block == 0]))
    codes, shape = _nibbles(rng, e, n, k), (e, n, -(-k // group_size))
    scale = _scales(rng, size / 6.5, *shape).astype((np.float16, bf16)[rng.integers(2)])
    zero = rng.integers(0, 17, shape).astype(np.uint8)
    given = {"proj": codes.view(np.int32) if k % 8 == 0 else codes, "scale": scale, "zero": zero}
    return given, decode_int4_zp(codes, scale, zero)


def _mxfp4(rng: np.random.Generator, size: float, e: int, n: int, k: int) -> Drawn:
    codes, scale = _nibbles(rng, e, n, k), _powers(rng, size / 2.9, e, n, -(-k // 32))
    given = scale.view(ml_dtypes.float8_e8m0fnu)
    return {"proj": codes, "scale": given}, decode_mxfp4(codes, scale, k)


def _nvfp4(rng: np.random.Generator, size: float, e: int, n: int, k: int) -> Drawn:
    codes, scale = _nibbles(rng, e, n, k), _e4m3(rng, e, n, -(-k // 16))
    whole = _scales(rng, size / 430, e)
    given = {"proj": codes, "scale": scale.view(ml_dtypes.float8_e4m3fn), "global_scale": whole}
    return given, decode_nvfp4(codes, scale, whole, k)


def draw_gguf(rng: np.random.Generator, name: str, size: float, e: int, n: int, k: int) -> Drawn:
    """Any codes of a type; with it, the arguments that it is loaded from."""
    if name in ("f32", "f16", "bf16"):
        values = size * rng.standard_normal((e, n, k), np.float32)
        rows = values.astype({"f32": np.float32, "f16": np.float16, "bf16": bf16}[name]).view(np.uint8)
        return {"proj": rows, "format": name}, decode_gguf(rows, name)
    found = GGUF_BLOCKS[name]
    scales = _scales(rng, size / found.typical, e, n, k // found.block)
    rows = draw_blocks(rng, name, scales).reshape(e, n, -1)
    return {"proj": rows, "format": name.upper()}, decode_gguf(rows, name)


def _llamafile(rng: np.random.Generator, size: float, e: int, n: int, k: int) -> Drawn:
    """One of the types whose blocks rows can be made of."""
    fitting = [name for name, fmt in GGUF_FORMATS.items() if k % fmt.block == 0]
    return draw_gguf(rng, str(rng.choice(fitting)), size, e, n, k)


_DRAW: dict[str, Callable[[np.random.Generator, float, int, int, int], Drawn]] = {
    "FP8": _fp8,
    "FP8_PERCHANNEL": _fp8_perchannel,
    "MXFP8": _mxfp8,
    "RAWINT4": _rawint4,
    "GPTQ_INT4": _gptq_int4,
    "INT4_ZP": _int4_zp,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "LLAMAFILE": _llamafile,
}

METHODS = tuple(
    name
    for info in ext.methods()
    for name in info.names
    if info.mode == "inference" and (info.scales or info.weights == "gguf")
)

#: The bytes of a block of 32 values of the methods that convert what they are given.
CONVERTED = {"GPTQ_INT4": 18, "INT4_ZP": 19}

#: The methods that hold the arrays that they are given.
IN_PLACE = tuple(method for method in METHODS if method not in CONVERTED)

#: The methods of `NativeMoEWrapper`, whose scales are arrays of their own.
WITH_SCALES = tuple(method for method in METHODS if method != "LLAMAFILE")


def draw_native_layer(
    rng: np.random.Generator,
    method: str,
    num_experts: int,
    inter_size: int,
    hidden_size: int,
    activation: Any = "silu",
    *,
    with_biases: bool = False,
    block: int = 32,
) -> NativeLayer:
    """Any codes, with scales that keep gate, up and outputs about as large as those of `draw_layer`.

    Sizes are the given ones, or the next that the method takes; `block` is the group size of an INT4_ZP
    layer.
    """
    if method in (*CONVERTED, "LLAMAFILE"):
        inter_size, hidden_size = -(-inter_size // block) * block, -(-hidden_size // block) * block
    plain = draw_layer(rng, num_experts, inter_size, hidden_size, activation, with_biases=with_biases)
    first, last = (num_experts, inter_size, hidden_size), (num_experts, hidden_size, inter_size)
    shapes = {"gate": first, "up": first, "down": last}
    if not parse_activation(activation).gated:
        del shapes["up"]
    arguments: dict[str, Any] = {"up_proj": None}
    matrices: dict[str, Any] = {"up_proj": None}
    for name, shape in shapes.items():
        size = (1.0 if name == "down" else 1.5) * shape[2] ** -0.5
        draw = partial(_int4_zp, block=block) if method == "INT4_ZP" else _DRAW[method]
        drawn, matrices[f"{name}_proj"] = draw(rng, size, *shape)
        arguments |= {f"{name}_{role}": array for role, array in drawn.items()}
    return NativeLayer(**matrices, **plain.biases, activation=activation, arguments=arguments)
