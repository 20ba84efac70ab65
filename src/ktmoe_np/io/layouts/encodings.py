"""How checkpoints store natively quantized experts: tables, one row per encoding and per pattern."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import ml_dtypes
import numpy as np

from ...formats.encodings import NATIVE_FORMATS
from ...formats.gptq import group_sizes
from ...formats.methods import find_method
from ...formats.zero_points import from_compressed_tensors
from .encoding import AnyArray, Encoding, Shapes, Sizes, TensorSpec
from .gptq import AWQ, GPTQ_INT4, GPTQ_ZERO_POINTS, scale_problem
from .name_patterns import NAME_PATTERNS, NamePattern

__all__ = ["ENCODINGS", "METHODS", "NATIVE_LAYOUTS"]

_FLOAT32 = np.dtype(np.float32)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_UINT8 = np.dtype(np.uint8)

#: E8M0 scales are bytes to torch versions without a dtype for them.
_E8M0 = ("U8", "F8_E8M0")


def _group_size(method: str) -> int:
    """Columns that share a scale."""
    size = NATIVE_FORMATS[method.lower()].group_size
    assert size is not None
    return size


def _elements(values: int, num_rows: int, num_columns: int) -> Shapes:
    """`values` weights an element."""
    return ((num_rows, num_columns // values),)


def _blocks_of_32(num_rows: int, num_columns: int) -> Shapes:
    """16 bytes per group of 32 nibbles."""
    return ((num_rows, num_columns // 32, 16),)


def _squares(num_rows: int, num_columns: int) -> Shapes:
    """A scale for each square block, the last ones as small as the rest is."""
    return (NATIVE_FORMATS["fp8"].scale_shape(num_rows, num_columns),)


def _channels(num_rows: int, num_columns: int) -> Shapes:
    """A scale for each row, or one for all of them."""
    return ((num_rows, 1), (num_rows,), (1,), ())


def _one(num_rows: int, num_columns: int) -> Shapes:
    return ((), (1,))


def _two(num_rows: int, num_columns: int) -> Shapes:
    return ((2,),)


def _other_size(array: AnyArray, sizes: Sizes) -> str | None:
    """The error of a tensor of N and K; None if there is none."""
    expected = [sizes.num_rows, sizes.num_columns]
    return None if array.tolist() == expected else f"got {array.tolist()}, expected {expected}"


def _groups(suffix: str, dtypes: tuple[str, ...], size: int) -> TensorSpec:
    """Scales of groups of `size` weights of a row."""
    return TensorSpec(suffix, dtypes, partial(_elements, size))


def _fp8(suffix: str) -> Encoding:
    scale = TensorSpec(suffix, ("F32", "BF16", "F8_E8M0"), _squares)
    return Encoding("FP8", _E4M3, scale, _FLOAT32)


def _mxfp8(suffix: str) -> Encoding:
    size = _group_size("MXFP8")
    return Encoding("MXFP8", _E4M3, _groups(suffix, _E8M0, size), _UINT8, group_size=size)


def _mxfp4(codes: TensorSpec, suffix: str) -> Encoding:
    size = _group_size("MXFP4")
    return Encoding("MXFP4", codes, _groups(suffix, _E8M0, size), _UINT8, values=2, group_size=size)


def _nvfp4(codes: str, factor: str, reciprocal: bool) -> Encoding:
    return Encoding(
        "NVFP4",
        TensorSpec(codes, ("U8",), partial(_elements, 2)),
        _groups(".weight_scale", ("F8_E4M3",), _group_size("NVFP4")),
        _UINT8,
        values=2,
        group_size=_group_size("NVFP4"),
        global_scale=TensorSpec(factor, ("F32",), _one),
        reciprocal=reciprocal,
    )


_PACKED = TensorSpec(".weight_packed", ("I32",), partial(_elements, 8))
_SHAPE = TensorSpec(".weight_shape", ("I64", "I32"), _two, _other_size)


def _rawint4(group_size: int) -> Encoding:
    """compressed-tensors, format "pack-quantized": Kimi-K2-Thinking has groups of 32."""
    return Encoding(
        "RAWINT4",
        _PACKED,
        _groups(".weight_scale", ("BF16",), group_size),
        _BFLOAT16,
        values=8,
        group_size=group_size,
        others=(_SHAPE,),
        refused=(".weight_zero_point", ".weight_g_idx"),
    )


def _groups_of_any_size(num_rows: int, num_columns: int) -> Shapes:
    """A scale for each group, of any size that groups may have."""
    return tuple((num_rows, count) for count in group_sizes(num_columns))


def _zeros_of_groups(num_rows: int, num_columns: int) -> Shapes:
    """As scales, eight of N in a number."""
    return tuple((-(-num_rows // 8), count) for count in group_sizes(num_columns))


def _zeros_problem(array: AnyArray, sizes: Sizes) -> str | None:
    num_groups = sizes.scale[1]
    if array.shape[1] == num_groups:
        return None
    return f"got {array.shape[1]} groups, expected {num_groups} as of the scales"


#: The same with zero points, with groups of other sizes or a scale for each row, or with scales in float16.
_PACKED_ZERO_POINTS = Encoding(
    "INT4_ZP",
    _PACKED,
    TensorSpec(".weight_scale", ("BF16", "F16"), _groups_of_any_size, scale_problem),
    np.dtype(np.float16),
    values=8,
    group_size=32,
    zeros=TensorSpec(".weight_zero_point", ("I32",), _zeros_of_groups, _zeros_problem, optional=True),
    others=(_SHAPE,),
    refused=(".weight_g_idx",),
    unpack=lambda codes, scale, zeros, _: from_compressed_tensors(codes, scale, zeros),
)


_E4M3 = TensorSpec(".weight", ("F8_E4M3",), partial(_elements, 1))

#: Of encodings that fit equally well, when something is wrong or missing, the first counts.
ENCODINGS = (
    _fp8(".weight_scale_inv"),  # DeepSeek-V3, Qwen3, GLM, MiniMax-M2
    Encoding("FP8_PERCHANNEL", _E4M3, TensorSpec(".weight_scale", ("F32", "BF16"), _channels), _FLOAT32),
    _mxfp8(".weight_scale_inv"),  # MiniMax-M3
    _mxfp8(".weight_scale"),
    _fp8(".weight_scale"),  # compressed-tensors, strategy "block"
    _fp8(".scale"),  # DeepSeek-V4 before its experts are four bits wide
    *(_rawint4(size) for size in find_method("RAWINT4", "inference").encodings if size is not None),
    _PACKED_ZERO_POINTS,
    GPTQ_INT4,
    GPTQ_ZERO_POINTS,
    AWQ,
    _nvfp4(".weight", ".weight_scale_2", reciprocal=False),  # ModelOpt
    _nvfp4(".weight_packed", ".weight_global_scale", reciprocal=True),  # compressed-tensors
    _mxfp4(TensorSpec(".weight_packed", ("U8",), partial(_elements, 2)), ".weight_scale"),  # Kimi-K3
    _mxfp4(TensorSpec(".weight", ("U8", "I8"), partial(_elements, 2)), ".scale"),  # DeepSeek-V4
)

_GPT_OSS = NamePattern(
    {"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"},
    {"gate_up": "mlp.experts.gate_up_proj_bias", "down": "mlp.experts.down_proj_bias"},
    interleaved=True,
)


def _stems(pattern: NamePattern) -> NamePattern:
    """`pattern` with the projections' names instead of those of their weights."""
    return replace(
        pattern, tensors={role: name.removesuffix(".weight") for role, name in pattern.tensors.items()}
    )


#: Name patterns of projections, each with an encoding. Fused gate_up has no encoding but that of gpt-oss.
NATIVE_LAYOUTS: tuple[tuple[NamePattern, Encoding], ...] = (
    *(
        (_stems(pattern), encoding)
        for pattern in NAME_PATTERNS
        if "gate" in pattern.tensors
        for encoding in ENCODINGS
    ),
    (_GPT_OSS, _mxfp4(TensorSpec("_blocks", ("U8",), _blocks_of_32), "_scales")),
)

METHODS = tuple(dict.fromkeys(encoding.method for encoding in ENCODINGS))
