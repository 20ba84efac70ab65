"""The benched layer in the encodings that checkpoints come in: nearest codes, scales from the largest."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .layer import Layer, to_float32

__all__ = [
    "encode_fp8",
    "encode_fp8_perchannel",
    "encode_gptq_int4",
    "encode_int4_zp",
    "encode_mxfp4",
    "encode_mxfp8",
    "encode_nvfp4",
    "encode_rawint4",
]

Array = NDArray[Any]
Encoded = dict[str, Array]  # codes as "proj", "scale" and perhaps "global_scale" or "zero"

E4M3 = ml_dtypes.float8_e4m3fn
_LARGEST_E4M3, _LARGEST_E2M1 = 448.0, 6.0


def _each_expert(encode: Callable[[Array], Encoded]) -> Callable[[Layer], dict[str, Any]]:
    """From a function of one matrix, float32 [N, K], to one of a layer: what such a layer is loaded from."""

    def encode_layer(layer: Layer) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for name in ("gate", "up", "down"):
            weights = getattr(layer, name)
            with ThreadPoolExecutor() as threads:
                matrices = list(threads.map(lambda w: encode(to_float32(w)), weights))
            for role in matrices[0]:
                arrays = [matrix[role] for matrix in matrices]
                arguments[f"{name}_{role}"] = np.array(arrays) if role == "global_scale" else arrays
            arguments[f"{name}_bias"] = getattr(layer, f"{name}_bias")
        return arguments

    return encode_layer


def _groups(weights: Array, size: int) -> Array:
    """[N, K] as [N, K / size, size], zeros behind the last column."""
    padded = np.pad(weights, ((0, 0), (0, -weights.shape[1] % size)))
    return padded.reshape(len(weights), -1, size)


def _powers(largest: Array, of_codes: int) -> Array:
    """E8M0 that bring the largest below the largest code's power of two, as the OCP specification says."""
    exponents = np.floor(np.log2(np.maximum(largest, 2.0**-100))) - of_codes
    scale: Array = (exponents + 127).astype(np.uint8)
    return scale


def _nibbles(codes: Array, num_columns: int) -> Array:
    """Two codes per byte, the low one first."""
    flat = codes.reshape(len(codes), -1)[:, :num_columns].astype(np.uint8)
    packed: Array = flat[:, ::2] | flat[:, 1::2] << np.uint8(4)
    return packed


def _e2m1(values: Array) -> Array:
    """Nearest codes of E2M1 to float32."""
    sizes = np.abs(values)
    code = np.zeros(values.shape, np.uint8)
    for boundary in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0):
        code += sizes > boundary
    nearest: Array = code | np.signbit(values).astype(np.uint8) << np.uint8(3)
    return nearest


def _fp8(weights: Array) -> Encoded:
    rows, columns = (-(-size // 128) for size in weights.shape)
    padded = np.zeros((rows * 128, columns * 128), np.float32)
    padded[: weights.shape[0], : weights.shape[1]] = weights
    blocks = padded.reshape(rows, 128, columns, 128)
    scale = np.abs(blocks).max(axis=(1, 3)) / np.float32(_LARGEST_E4M3)
    codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[: weights.shape[0], : weights.shape[1]]
    return {"proj": np.ascontiguousarray(codes.astype(E4M3)), "scale": scale}


def _fp8_perchannel(weights: Array) -> Encoded:
    scale = np.abs(weights).max(axis=1) / np.float32(_LARGEST_E4M3)
    return {"proj": (weights / scale[:, None]).astype(E4M3), "scale": scale}


def _mxfp8(weights: Array) -> Encoded:
    groups = _groups(weights, 32)
    scale = _powers(np.abs(groups).max(axis=2), 8)
    scaled = np.ldexp(groups, 127 - scale.astype(np.int32)[..., None])
    codes = np.clip(scaled, -_LARGEST_E4M3, _LARGEST_E4M3).reshape(len(weights), -1)[:, : weights.shape[1]]
    return {"proj": np.ascontiguousarray(codes.astype(E4M3)), "scale": scale}


def _rawint4(weights: Array) -> Encoded:
    groups = _groups(weights, 32)
    scale = (np.abs(groups).max(axis=2) / np.float32(7)).astype(ml_dtypes.bfloat16)
    numbers = np.clip(np.rint(groups / scale.astype(np.float32)[..., None]), -8, 7) + 8
    return {"proj": _nibbles(numbers, weights.shape[1]), "scale": scale}


def _gptq_int4(weights: Array) -> Encoded:
    groups = _groups(weights, 128)
    scale = (np.abs(groups).max(axis=2) / np.float32(7)).astype(np.float16)
    numbers = np.clip(np.rint(groups / scale.astype(np.float32)[..., None]), -8, 7) + 8
    codes = _nibbles(numbers, weights.shape[1]).view(np.int32)  # eight of a row in a word
    return {"proj": np.ascontiguousarray(codes.T), "scale": np.ascontiguousarray(scale.T)}


def _int4_zp(weights: Array) -> Encoded:
    groups = _groups(weights, 128)
    least, most = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
    scale = ((most - least) / np.float32(15)).astype(np.float16)
    wide = scale.astype(np.float32)
    zero = np.clip(np.rint(-least / wide), 0, 15)
    numbers = np.clip(np.rint(groups / wide[..., None]) + zero[..., None], 0, 15)
    return {"proj": _nibbles(numbers, weights.shape[1]), "scale": scale, "zero": zero.astype(np.uint8)}


def _mxfp4(weights: Array) -> Encoded:
    groups = _groups(weights, 32)
    scale = _powers(np.abs(groups).max(axis=2), 2)
    codes = _e2m1(np.ldexp(groups, 127 - scale.astype(np.int32)[..., None]))
    return {"proj": _nibbles(codes, weights.shape[1]), "scale": scale}


def _nvfp4(weights: Array) -> Encoded:
    groups = _groups(weights, 16)
    largest = np.abs(groups).max(axis=2) / np.float32(_LARGEST_E2M1)
    whole = largest.max() / np.float32(_LARGEST_E4M3)
    scale = (largest / whole).astype(E4M3)
    codes = _e2m1(groups / (scale.astype(np.float32) * whole)[..., None])
    return {"proj": _nibbles(codes, weights.shape[1]), "scale": scale, "global_scale": np.float32(whole)}


encode_fp8 = _each_expert(_fp8)
encode_fp8_perchannel = _each_expert(_fp8_perchannel)
encode_mxfp8 = _each_expert(_mxfp8)
encode_rawint4 = _each_expert(_rawint4)
encode_gptq_int4 = _each_expert(_gptq_int4)
encode_int4_zp = _each_expert(_int4_zp)
encode_mxfp4 = _each_expert(_mxfp4)
encode_nvfp4 = _each_expert(_nvfp4)
