"""The weight formats that are benched: a further one is a row here, and a name in the peers that have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .encoders import (
    encode_fp8,
    encode_fp8_perchannel,
    encode_gptq_int4,
    encode_mxfp4,
    encode_mxfp8,
    encode_nvfp4,
    encode_rawint4,
)
from .encoders_gguf import GGUF_FORMATS
from .layer import Layer

__all__ = ["METHODS", "Method"]


def _as_they_are(layer: Layer) -> dict[str, Any]:
    biases = ("gate_bias", "up_bias", "down_bias")
    weights = {"gate_proj": layer.gate, "up_proj": layer.up, "down_proj": layer.down}
    return weights | {name: getattr(layer, name) for name in biases}


@dataclass(frozen=True)
class Method:
    """What a bench must know of a method."""

    name: str
    bytes_per_weight: float  #: in the checkpoint's encoding, scales counted in
    tolerance: float  #: relative error from which on an answer is wrong
    operation: str = "forward"  #: what it is for
    product: str = "bfloat16"  #: whose limit counts: "bfloat16" or "int8"
    encode: Callable[[Layer], dict[str, Any]] = _as_they_are  #: to the arguments of load_weights_from_tensors
    wrapper: str = ""  #: the library's name for it, where that is another

    @property
    def of_bf16(self) -> float:
        """Bytes in this encoding for each byte of the shared bf16 weights."""
        return self.bytes_per_weight / 2.0

    @property
    def library_name(self) -> str:
        """The method as the library knows it."""
        return self.wrapper or self.name


def _gguf(name: str, tolerance: float) -> Method:
    """All three projections in one tensor type."""
    fmt = GGUF_FORMATS[name]
    size = fmt.block_bytes / fmt.block
    return Method(f"LLAMAFILE-{name}", size, tolerance, encode=fmt.encode, wrapper="LLAMAFILE")


_FORWARD = (
    Method("BF16", 2.0, 0.02),
    Method("AMXINT8", 1.0, 0.05, product="int8"),
    Method("AMXINT4", 17 / 32, 0.3, product="int8"),
    Method("MOE_INT8", 1.0, 0.03),
    Method("MOE_INT4", 17 / 32, 0.3),
    Method("FP8", 1.0, 0.06, encode=encode_fp8),
    Method("FP8_PERCHANNEL", 1.0, 0.06, encode=encode_fp8_perchannel),
    Method("MXFP8", 33 / 32, 0.06, encode=encode_mxfp8),
    Method("RAWINT4", 18 / 32, 0.25, encode=encode_rawint4),
    Method("GPTQ_INT4", 33 / 64, 0.3, encode=encode_gptq_int4),
    Method("MXFP4", 17 / 32, 0.3, encode=encode_mxfp4),
    Method("NVFP4", 9 / 16, 0.25, encode=encode_nvfp4),
    _gguf("F32", 0.02),
    _gguf("F16", 0.02),
    _gguf("Q4_0", 0.25),
    _gguf("Q4_1", 0.2),
    _gguf("Q5_0", 0.12),
    _gguf("Q5_1", 0.1),
    _gguf("Q8_0", 0.03),
    _gguf("Q2_K", 0.8),
    _gguf("Q3_K", 0.45),
    _gguf("Q4_K", 0.2),
    _gguf("Q5_K", 0.1),
    _gguf("Q6_K", 0.06),
    _gguf("IQ4_NL", 0.2),
    _gguf("IQ4_XS", 0.2),
)


def _training(method: Method) -> Method:
    """The same weights, to train adapters on; gradients may be as far from the reference as outputs.

    Of the products of a step most are of its backward pass, in bf16.
    """
    name = f"AMX{method.name}" if method.name in ("BF16", "FP8") else method.name
    wrapper = method.wrapper and f"{method.wrapper}_SFT"
    return replace(method, name=f"{name}_SFT", wrapper=wrapper, operation="sft", product="bfloat16")


METHODS = {method.name: method for method in (*_FORWARD, *map(_training, _FORWARD))}
