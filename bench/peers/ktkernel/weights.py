"""The encodings of checkpoints as kt-kernel's extension takes them: the very codes and scales of the others.

Codes with separate scales are packed at load and may be released afterwards; GGUF blocks stay in use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.layer import Array, Layer, bfloat16
from ...core.methods import METHODS
from .memory import address, aligned

__all__ = ["GGUF_CLASS", "GGUF_WITHOUT", "GROUPS", "give_gguf", "give_groups"]

_PROJECTIONS = ("gate", "up", "down")


def _as_it_is(scale: Array) -> Array:
    return scale


def _as_float32(scale: Array) -> Array:
    return scale.astype(np.float32)


def _powers_as_bf16(scale: Array) -> Array:
    """E8M0, whose bits are those of an exponent of bf16."""
    return (scale.astype(np.uint16) << 7).view(bfloat16)


@dataclass(frozen=True)
class Groups:
    """An encoding with separate scales."""

    classes: tuple[str, ...]  #: of the extension; the first that it and the CPU have is taken
    bits: int
    group_size: int  #: 0: a scale for each row
    scale: Callable[[Array], Array] = _as_it_is  #: to what the extension takes, which loses nothing


#: By method.
GROUPS = {
    "FP8": Groups(("AMXFP8_MOE", "AVX2FP8_MOE"), 8, 128),
    "FP8_PERCHANNEL": Groups(("AMXFP8PerChannel_MOE",), 8, 0),
    "RAWINT4": Groups(("AMXInt4_KGroup_MOE", "AVX2RawInt4_MOE"), 4, 32),
    "MXFP8": Groups(("AMXMXFP8_KGroup_MOE", "AVX2MXFP8_MOE"), 8, 32),
    "GPTQ_INT4": Groups(("AVXVNNI256GPTQInt4Packed_MOE", "AVX2GPTQInt4_MOE"), 4, 128, _as_float32),
    "MXFP4": Groups(("AMXFP4_KGroup_MOE", "AVX2MXFP4_MOE"), 4, 32, _powers_as_bf16),
}

#: For the GGUF tensor types, and those of them that end its process or give another answer.
GGUF_CLASS, GGUF_WITHOUT = "MOE", ("IQ4_NL",)

#: What its own Python layer sets: rows of a task, and tokens from which on those of an expert go together.
_GGUF_ROWS, _GGUF_LEAST_TOKENS = 32, 10


def give_groups(config: Any, method: str, layer: Layer) -> Any:
    """Fill in codes and scales; what is returned must live until the layer is loaded."""
    groups, encoded, kept = GROUPS[method], METHODS[method].encode(layer), []
    config.gate_proj = config.up_proj = config.down_proj = 0
    for name in _PROJECTIONS:
        codes = [aligned(matrix) for matrix in encoded.pop(f"{name}_proj")]
        scales = [aligned(groups.scale(scale)) for scale in encoded.pop(f"{name}_scale")]
        setattr(config, f"{name}_projs", [[address(matrix) for matrix in codes]])
        setattr(config, f"{name}_scales", [[address(scale) for scale in scales]])
        kept += [*codes, *scales]
    config.quant_config.bits, config.quant_config.zero_point = groups.bits, False
    if groups.group_size:
        config.quant_config.group_size = groups.group_size
    else:
        config.quant_config.per_channel = True
    return kept


def give_gguf(config: Any, types: Any, method: str, layer: Layer) -> Any:
    """Fill in blocks and their types, numbered by `types`; what is returned must outlive the layer."""
    encoded = METHODS[method].encode(layer)
    for name in _PROJECTIONS:
        setattr(config, f"{name}_proj", address(encoded[f"{name}_proj"]))
        setattr(config, f"{name}_type", int(getattr(types, encoded[f"{name}_format"])))
    config.hidden_type = int(types.BF16)
    config.m_block, config.group_min_len = _GGUF_ROWS, _GGUF_LEAST_TOKENS
    config.group_max_len = config.max_len
    return encoded
