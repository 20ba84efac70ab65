"""The weight formats that are benched: a further one is a row here, and a name in the peers that have it.

GGUF types need no row: those without an encoder are timed with random blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .encoders import (
    encode_fp8,
    encode_fp8_perchannel,
    encode_gptq_int4,
    encode_int4_zp,
    encode_mxfp4,
    encode_mxfp8,
    encode_nvfp4,
    encode_rawint4,
)
from .encoders_gguf import GGUF_FORMATS, GgufFormat
from .layer import Layer
from .random_gguf import RandomGguf, random_formats

__all__ = ["METHODS", "Method"]


def _registry() -> tuple[list[Any], list[Any]]:
    """List the methods and formats of the library; none where an interpreter has a peer alone."""
    try:
        from ktmoe_np import kt_kernel_ext as ext

        return ext.methods(), ext.formats()
    except (ImportError, AttributeError):  # without its extension, the library's folder may be a package
        return [], []


_METHODS, _FORMATS = _registry()


def _as_they_are(layer: Layer) -> dict[str, Any]:
    biases = ("gate_bias", "up_bias", "down_bias")
    weights = {"gate_proj": layer.gate, "up_proj": layer.up, "down_proj": layer.down}
    return weights | {name: getattr(layer, name) for name in biases}


def _keep(_: Layer) -> None:
    """Leave the shared weights as they were drawn."""


@dataclass(frozen=True)
class Method:
    """The properties of a method that a bench needs."""

    name: str
    tolerance: float  #: relative error from which on an answer is wrong
    bytes_per_weight: float  #: block scales included
    operation: str = "forward"  #: what it is for
    product: str = "bfloat16"  #: whose limit counts: "bfloat16" or "int8"
    activation_block: int = 0  #: columns that share a scale of activations asked for in int8; 0: not possible
    encode: Callable[[Layer], dict[str, Any]] = _as_they_are  #: to the arguments of load_weights_from_tensors
    replace_weights: Callable[[Layer], None] = _keep  #: called once, before anybody loads the layer
    wrapper: str = ""  #: the library's name for it, where that is another

    @property
    def of_bf16(self) -> float:
        """Bytes in this encoding for each byte of the shared bf16 weights."""
        return self.bytes_per_weight / 2.0

    @property
    def library_name(self) -> str:
        """The method as the library knows it."""
        return self.wrapper or self.name


def _gguf(fmt: GgufFormat | RandomGguf) -> Method:
    """All three projections in one tensor type."""
    size = fmt.block_bytes / fmt.block
    named = (f for f in _FORMATS if f.gguf_type is not None and f.name == fmt.name.lower())
    block = next((f.activation_block for f in named), 0)
    return Method(
        f"LLAMAFILE-{fmt.name}",
        fmt.tolerance,
        size,
        activation_block=block,
        encode=fmt.encode,
        wrapper="LLAMAFILE",
    )


def _random_gguf(fmt: RandomGguf) -> Method:
    """Likewise, of a type that nothing here encodes."""
    return replace(_gguf(fmt), replace_weights=fmt.replace_weights)


def _method(name: str, tolerance: float, **options: Any) -> Method:
    """Size and product as the library says, in the method's default format."""
    info = next((info for info in _METHODS if info.names[0] == name), None)
    if info is None:
        return Method(name, tolerance, 2.0, **options)
    encoded, k = info.formats[0], 1 << 14
    size = encoded.row_bytes(k) / k
    if encoded.scale_rows:
        size += encoded.scale_bytes(k) / k / encoded.scale_rows
    block = encoded.activation_block if info.product == "bfloat16" else 0
    return Method(name, tolerance, size, product=info.product, activation_block=block, **options)


_FORWARD = (
    _method("BF16", 0.02),
    _method("AMXINT8", 0.05),
    _method("AMXINT4", 0.3),
    _method("MOE_INT8", 0.03),
    _method("MOE_INT4", 0.3),
    _method("FP8", 0.06, encode=encode_fp8),
    _method("FP8_PERCHANNEL", 0.06, encode=encode_fp8_perchannel),
    _method("MXFP8", 0.06, encode=encode_mxfp8),
    _method("RAWINT4", 0.25, encode=encode_rawint4),
    _method("GPTQ_INT4", 0.3, encode=encode_gptq_int4),
    _method("INT4_ZP", 0.3, encode=encode_int4_zp),
    _method("MXFP4", 0.3, encode=encode_mxfp4),
    _method("NVFP4", 0.25, encode=encode_nvfp4),
    *map(_gguf, GGUF_FORMATS.values()),
    *map(_random_gguf, random_formats(set(GGUF_FORMATS))),
)


def _training(method: Method) -> Method:
    """The same weights, to train adapters on; gradients may be as far from the reference as outputs.

    Of the products of a step most are of its backward pass, in bf16.
    """
    name = f"AMX{method.name}" if method.name in ("BF16", "FP8") else method.name
    wrapper = method.wrapper and f"{method.wrapper}_SFT"
    return replace(method, name=f"{name}_SFT", wrapper=wrapper, operation="sft", product="bfloat16")


METHODS = {method.name: method for method in (*_FORWARD, *map(_training, _FORWARD))}
