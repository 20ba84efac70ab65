"""Readers of the native encodings that others wrote, and what they read is compared with.

Those are torch's own conversions, transformers, compressed-tensors and, for GPTQ, Intel's neural-compressor.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from layers import assert_same_bits, bf16
from native_checkpoints import LAYER, config_of, draw_layer, put_layer

from ktmoe_np.config import MoEConfig
from ktmoe_np.formats.weights import ExpertWeights
from ktmoe_np.io.native import load_native
from ktmoe_np.reference import (
    ScaledMatrix,
    decode_fp8,
    decode_fp8_perchannel,
    decode_gptq_int4,
    decode_int4_zp,
    decode_mxfp4,
    decode_mxfp8,
    decode_nvfp4,
    decode_rawint4,
    dequantize,
)

__all__ = [
    "E4M3",
    "RAGGED",
    "READERS",
    "SCHEMES",
    "AnyArray",
    "E",
    "Tensors",
    "as_tensor",
    "assert_read_alike",
    "assert_same_numbers",
    "compressor",
    "decoded",
    "of_compressed_tensors",
    "of_gptq",
    "of_matrix",
    "plain",
    "stacked",
    "written",
]

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

AnyArray = Any
Tensors = dict[str, Any]  # by what their names have behind the projection's

E = 2

E4M3 = ml_dtypes.float8_e4m3fn


# ---- what is compared ----


def as_tensor(array: AnyArray) -> Any:
    """The same bits for torch, which knows no ml_dtypes."""
    array = np.ascontiguousarray(array)
    same = {np.dtype(bf16): torch.bfloat16, np.dtype(E4M3): torch.float8_e4m3fn}.get(array.dtype)
    return (
        torch.from_numpy(array)
        if same is None
        else torch.from_numpy(array.view(f"u{array.itemsize}")).view(same)
    )


def as_array(tensor: Any) -> AnyArray:
    """Numbers of float32 or bfloat16, in that dtype."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(bf16)
    assert tensor.dtype == torch.float32
    return tensor.numpy()


def assert_same_numbers(ours: Any, theirs: Any) -> None:
    """To the bit, but for which NaN it is; in bfloat16 when one of them is."""
    mine, other = plain(ours), as_array(theirs)
    if bf16 in (mine.dtype, other.dtype):
        with np.errstate(over="ignore"):
            mine, other = mine.astype(bf16), as_array(theirs.bfloat16())
    nan = np.isnan(other.astype(np.float32))
    assert np.array_equal(np.isnan(mine.astype(np.float32)), nan)
    assert not nan.all()
    zero = np.zeros((), mine.dtype)
    assert_same_bits(np.where(nan, zero, mine), np.where(nan, zero, other))


#: Of a matrix: codes, scale, global scale, and the number of its columns.
DECODE: dict[str, Callable[[AnyArray, AnyArray, Any, int], Any]] = {
    "FP8": lambda codes, scale, _, k: decode_fp8(codes, scale),
    "FP8_PERCHANNEL": lambda codes, scale, _, k: decode_fp8_perchannel(codes, scale),
    "MXFP8": lambda codes, scale, _, k: decode_mxfp8(codes, scale),
    "RAWINT4": lambda codes, scale, _, k: decode_rawint4(codes, scale, k),
    "GPTQ_INT4": lambda codes, scale, _, k: decode_gptq_int4(codes, scale),
    "MXFP4": lambda codes, scale, _, k: decode_mxfp4(codes, scale, k),
    "INT4_ZP": lambda codes, scale, zero, _: decode_int4_zp(codes, scale, zero),
    "NVFP4": decode_nvfp4,
}


def plain(matrix: Any) -> AnyArray:
    """A matrix as an array, in the finest dtype that its numbers need."""
    return matrix if isinstance(matrix, np.ndarray) else dequantize(matrix)


def stacked(matrices: list[Any]) -> Any:
    if isinstance(matrices[0], np.ndarray):
        return np.stack(matrices)
    return ScaledMatrix(
        *(np.stack([getattr(m, part) for m in matrices]) for part in ("codes", "channel_scale"))
    )


def decoded(experts: ExpertWeights, projection: str, config: MoEConfig) -> list[Any]:
    """The matrices of a projection that has been loaded."""
    found = experts.projections[projection]
    extra = found.global_scale if found.zero_points is None else found.zero_points
    factors = [None] * len(found.codes) if extra is None else extra
    k = config.moe_intermediate_size if projection == "down_proj" else config.hidden_size
    each = zip(found.codes, found.scales, factors, strict=True)
    return [DECODE[experts.method](*matrix, k) for matrix in each]


# ---- files, by those who read them too ----


def of_fine_grained_fp8(tensors: Tensors) -> Any:
    """What transformers makes of a matrix; of bytes of signed integers, two numbers of E2M1 each."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = tensors.values()
    weight = weight.view(torch.int8) if weight.dtype == torch.uint8 else weight
    return Fp8Dequantize(None).convert({"weight": weight, "weight_scale_inv": scale})["weight"]


def of_blocks_of_fp8(tensors: Tensors) -> Any:
    """What compressed-tensors makes of DeepSeek's blocks, ragged ones included."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer

    return FP8BlockDequantizer().process({f"m{suffix}": array for suffix, array in tensors.items()})[
        "m.weight"
    ]


#: Formats of compressed-tensors, and how they describe their weights.
SCHEMES: dict[str, dict[str, Any]] = {
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "mxfp4-pack-quantized": {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    },
    "mxfp8-quantized": {
        "num_bits": 8,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    },
    "nvfp4-pack-quantized": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    },
}


CHANNELS = {"strategy": "channel", "group_size": None}
BLOCKS = {"strategy": "block", "block_structure": [128, 128]}


def compressor(form: str, **other: Any) -> tuple[Any, Any]:
    """A class of compressed-tensors, and the scheme to call it with."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(**{**SCHEMES[form], **other})
    return BaseCompressor.get_value_from_registry(form), QuantizationScheme(
        targets=["Linear"], weights=weights
    )


def of_compressed_tensors(form: str, **other: Any) -> Callable[[Tensors], Any]:
    def read(tensors: Tensors) -> Any:
        reader, scheme = compressor(form, **other)
        named = {suffix[1:]: array for suffix, array in tensors.items()}
        if other.get("strategy") != "block" and form == "float-quantized":
            named["weight_scale"] = named["weight_scale"].reshape(-1, 1)
        if named["weight_scale"].dtype == torch.float16:  # which would round the weights
            named["weight_scale"] = named["weight_scale"].float()
        if form.startswith("mxfp"):
            named["weight_scale"] = named["weight_scale"].view(torch.uint8)
        return reader.decompress(named, scheme)["weight"]

    return read


def of_modelopt(tensors: Tensors) -> Any:
    """As compressed-tensors takes over ModelOpt's names and factors."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter

    converter = ModelOptNvfp4Converter(targets=["re:.*"])
    taken = converter.process({f"m{suffix}": array for suffix, array in tensors.items()})
    return of_compressed_tensors("nvfp4-pack-quantized")({name[1:]: array for name, array in taken.items()})


def of_gptq(version: int) -> Callable[[Tensors], Any]:
    """What neural-compressor makes of GPTQ's tensors; it knows the first version of the format."""

    def read(tensors: Tensors) -> Any:
        pytest.importorskip("neural_compressor")
        from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear

        qweight, scales, qzeros = (tensors[name] for name in (".qweight", ".scales", ".qzeros"))
        k, n = 8 * qweight.shape[0], qweight.shape[1]
        size = k // len(scales)
        module = INCWeightOnlyLinear(k, n, bits=4, group_size=size, zp=True, g_idx=".g_idx" in tensors)
        # In float32 products are exact; float16, as it is made, would round them.
        module.float_type = torch.float32
        module.qweight, module.scales = qweight, scales.float()
        # The first version stores zeros less one, in every nibble.
        module.qzeros = qzeros - (0x11111111 if version == 2 else 0)
        if ".g_idx" in tensors:
            module.g_idx = tensors[".g_idx"]
        return module.recover()

    return read


def of_awq(tensors: Tensors) -> Any:
    """The definition of AWQ's format, a number at a time: no one else reads it on a CPU."""

    def unpacked(words: Any) -> Any:
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        columns = torch.empty(len(words), words.shape[1], 8, dtype=torch.float32)
        for place, column in enumerate(order):
            columns[:, :, column] = ((words >> (4 * place)) & 15).float()
        return columns.flatten(1)

    q, z, scales = unpacked(tensors[".qweight"]), unpacked(tensors[".qzeros"]), tensors[".scales"].float()
    group = torch.arange(len(q)) // (len(q) // len(scales))
    return ((q - z[group]) * scales[group]).T


#: What reads an encoding of `native_checkpoints`, all there are but gpt-oss's.
READERS: tuple[tuple[str, Callable[[Tensors], Any]], ...] = (
    ("fp8", of_fine_grained_fp8),
    ("fp8", of_blocks_of_fp8),
    ("fp8_bf16", of_fine_grained_fp8),
    ("fp8_bf16", of_blocks_of_fp8),
    ("fp8_compressed_tensors", of_compressed_tensors("float-quantized", **BLOCKS)),
    ("fp8_deepseek_v4", of_fine_grained_fp8),
    ("fp8_channel", of_compressed_tensors("float-quantized")),
    ("fp8_channel_bf16", of_compressed_tensors("float-quantized")),
    ("fp8_tensor", of_compressed_tensors("float-quantized", strategy="tensor")),
    ("mxfp8", of_fine_grained_fp8),
    ("mxfp8_e8m0", of_fine_grained_fp8),
    ("mxfp8_e8m0", of_compressed_tensors("mxfp8-quantized")),
    ("rawint4", of_compressed_tensors("pack-quantized")),
    ("rawint4_i32", of_compressed_tensors("pack-quantized")),
    ("gptq", of_gptq(1)),
    ("gptq_bf16", of_gptq(1)),
    ("gptq_v2", of_gptq(2)),
    ("gptq_zeros", of_gptq(1)),
    ("awq", of_awq),
    ("awq_128", of_awq),
    ("packed_zeros", of_compressed_tensors("pack-quantized", symmetric=False)),
    ("packed_zeros_f16", of_compressed_tensors("pack-quantized", symmetric=False, group_size=128)),
    ("packed_channel_zeros", of_compressed_tensors("pack-quantized", symmetric=False, **CHANNELS)),
    ("packed_channel", of_compressed_tensors("pack-quantized", **CHANNELS)),
    ("packed_f16", of_compressed_tensors("pack-quantized")),
    ("mxfp4_packed", of_compressed_tensors("mxfp4-pack-quantized")),
    ("mxfp4_packed_e8m0", of_compressed_tensors("mxfp4-pack-quantized")),
    ("mxfp4_deepseek_v4", of_fine_grained_fp8),
    ("mxfp4_u8", of_fine_grained_fp8),
    ("nvfp4_modelopt", of_modelopt),
    ("nvfp4_packed", of_compressed_tensors("nvfp4-pack-quantized")),
    ("step", of_fine_grained_fp8),
)

RAGGED = tuple(
    (encoding, read)
    for encoding, read in READERS
    if read is of_blocks_of_fp8 or encoding in ("fp8_compressed_tensors", "fp8_channel")
)


def written(directory: Path, encoding: str, inter: int, hidden: int) -> tuple[Tensors, MoEConfig]:
    """A layer's tensors as torch reads them back, and what it is.

    Scales of E8M0 are not NaN, which not everyone knows of, and factors are powers of two, as reciprocals
    and products of others are rounded in other places.
    """
    from safetensors.torch import load_file

    layer = draw_layer(encoding, E, inter, hidden)
    for name, array in layer.tensors.items():
        if "scale" in name and array.dtype in (np.uint8, ml_dtypes.float8_e8m0fnu):
            array.view(np.uint8)[array.view(np.uint8) == 255] = 254
        if name.endswith((".weight_scale_2", ".weight_global_scale")):
            array[...] = np.exp2(np.round(np.log2(array)) - 3)
    return load_file(put_layer(directory, layer)), config_of(E, inter, hidden)


def of_matrix(tensors: Tensors, projection: str, expert: int, layer: int = LAYER) -> Tensors:
    """The tensors of one matrix, of experts by themselves or of a stack."""
    stem = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
    found = {name.removeprefix(stem): tensors[name] for name in tensors if name.startswith(f"{stem}.")}
    if not found:
        stem = f"model.layers.{layer}.moe.{projection}"
        found = {n.removeprefix(stem): tensors[n][expert] for n in tensors if n.startswith(f"{stem}.")}
    order = [".weight", ".weight_packed", ".qweight"]
    return dict(sorted(found.items(), key=lambda item: item[0] not in order))


def assert_read_alike(directory: Path, encoding: str, read: Any, inter: int, hidden: int) -> None:
    tensors, config = written(directory, encoding, inter, hidden)
    experts = load_native(directory, LAYER, config)
    for projection in experts.projections:
        for expert, ours in enumerate(decoded(experts, projection, config)):
            assert_same_numbers(ours, read(of_matrix(tensors, projection, expert)))
