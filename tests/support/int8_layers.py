"""Layers whose products can take int8 activations: their weights as loaded, and as the reference has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gguf_blocks import GGUF_BLOCKS
from layers import AnyArray, Batch, Layer, assert_close, bf16, draw_layer
from native_layers import NativeLayer, draw_gguf, draw_native_layer
from quantized_layers import quantized_layer
from sft_layers import Student, draw_lora

from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.config import parse_activation
from ktmoe_np.reference import decode_rawint4

__all__ = ["METHODS", "PLAIN_TYPES", "REFUSING", "Int8Layer", "draw_int8_layer"]

_INFERENCE = [info for info in ext.methods() if info.mode == "inference"]

#: Method, group size: those that have int8 activations beside bf16.
METHODS: tuple[tuple[str, int | None], ...] = (
    *(
        (info.names[0], fmt.group if info.weights == "quantized" or len(info.formats) > 1 else None)
        for info in _INFERENCE
        if info.product != "int8"
        for fmt in info.formats
        if fmt.activation_block
    ),
    ("LLAMAFILE", None),
)

#: The methods that have bf16 alone.
REFUSING = tuple(
    info.names[0] for info in _INFERENCE if info.formats and not info.formats[0].activation_block
)

#: GGUF types whose products stay in bf16.
PLAIN_TYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Int8Layer:
    """A layer, its weights as the reference multiplies them with int8 activations, and its method."""

    layer: Layer
    integers: Layer
    method: str
    group_size: int | None = None

    def wrapper(self, num_experts_per_tok: int, *args: Any, **options: Any) -> Any:
        """The layer loaded; with the activations that are its method's own unless options say otherwise."""
        own = {"method": self.method, "group_size": self.group_size}
        return self.layer.wrapper(num_experts_per_tok, *args, **own, **options)

    def student(self, rng: np.random.Generator, rank: int) -> Student:
        """The layer with adapters."""
        lora = draw_lora(rng, self.layer, rank) if rank else {}
        return Student(self.layer, lora, rank, method=(f"{self.method}_SFT", self.group_size))

    def assert_close(self, actual: AnyArray, batch: Batch) -> None:
        """`actual` is what the reference says of int8 activations."""
        assert_close(actual, self.integers, batch, activation_dtype="int8")

    def scaling_inputs(self) -> Int8Layer:
        """The same layer with routing weights that scale its inputs."""
        layer, integers = (replace(each, scale_inputs=True) for each in (self.layer, self.integers))
        return replace(self, layer=layer, integers=integers)


def draw_int8_layer(
    rng: np.random.Generator,
    method: tuple[str, int | None],
    sizes: tuple[int, int, int],
    activation: Any = "silu",
    *,
    types: Sequence[str] = ("q4_k", "q8_0", "q6_k"),
    with_biases: bool = False,
) -> Int8Layer:
    """A layer of E, I and H, the last two rounded up to what the method takes.

    `types` are those of gate, up and down with the method ``LLAMAFILE``.
    """
    name, group_size = method
    options: dict[str, Any] = {"with_biases": with_biases}
    if name.startswith("MOE_"):
        plain = draw_layer(rng, *sizes, activation, **options)
        return Int8Layer(plain, quantized_layer(plain, name, group_size), name, group_size)
    if name == "LLAMAFILE":
        native = _draw_types(rng, types, sizes, activation, with_biases)
    elif name == "INT4_ZP":
        native = draw_native_layer(rng, name, *sizes, activation, block=group_size or 32, **options)
    elif group_size in (64, 128):
        native = _draw_rawint4(rng, group_size, sizes, activation, with_biases)
    else:
        native = draw_native_layer(rng, name, *sizes, activation, **options)
    return Int8Layer(native, native.with_integers(name, group_size or 32), name, group_size)


def _draw_types(
    rng: np.random.Generator,
    types: Sequence[str],
    sizes: tuple[int, int, int],
    activation: Any,
    with_biases: bool,
) -> NativeLayer:
    """A layer of GGUF types, of widths that are whole blocks."""
    num_experts, inter, hidden = sizes
    gate, up, down = (GGUF_BLOCKS[name].block if name in GGUF_BLOCKS else 1 for name in types)
    hidden, inter = -(-hidden // max(gate, up)) * max(gate, up), -(-inter // down) * down
    plain = draw_layer(rng, num_experts, inter, hidden, activation, with_biases=with_biases)
    arguments: dict[str, Any] = {"up_proj": None}
    matrices: dict[str, Any] = {"up_proj": None}
    for role, type_name, (n, k) in _shapes(types, activation, inter, hidden):
        size = (1.0 if role == "down" else 1.5) * k**-0.5
        drawn, matrices[f"{role}_proj"] = draw_gguf(rng, type_name, size, num_experts, n, k)
        arguments |= {f"{role}_{part}": value for part, value in drawn.items()}
    return NativeLayer(**matrices, **plain.biases, activation=activation, arguments=arguments)


def _draw_rawint4(
    rng: np.random.Generator,
    group_size: int,
    sizes: tuple[int, int, int],
    activation: Any,
    with_biases: bool,
) -> NativeLayer:
    """A layer in RAWINT4 of larger groups."""
    num_experts, inter, hidden = sizes
    plain = draw_layer(rng, *sizes, activation, with_biases=with_biases)
    arguments: dict[str, Any] = {"up_proj": None}
    matrices: dict[str, Any] = {"up_proj": None}
    for role, _, (n, k) in _shapes(("",) * 3, activation, inter, hidden):
        codes = rng.integers(0, 256, (num_experts, n, -(-k // 2)), np.uint8)
        scale = rng.uniform(0.2, 1, (num_experts, n, -(-k // group_size))) * k**-0.5 / 3
        arguments |= {f"{role}_proj": codes, f"{role}_scale": scale.astype(bf16)}
        matrices[f"{role}_proj"] = decode_rawint4(codes, scale.astype(bf16), k, group_size=group_size)
    return NativeLayer(**matrices, **plain.biases, activation=activation, arguments=arguments)


def _shapes(
    types: Sequence[str], activation: Any, inter: int, hidden: int
) -> list[tuple[str, str, tuple[int, int]]]:
    """Role, type, rows and columns of the projections that there are."""
    shapes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
    gated = parse_activation(activation).gated
    return [
        (role, name, shapes[role]) for role, name in zip(shapes, types, strict=True) if gated or role != "up"
    ]
