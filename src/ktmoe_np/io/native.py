"""The experts of a layer in the quantized format of their checkpoint, as views of the mapped files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import chosen_experts
from ..arrays.types import IntegersLike
from ..config import MoEConfig
from ..formats.conversion import convert_each
from ..formats.encodings import NATIVE_FORMATS
from ..formats.weights import ExpertWeights, Projection
from ..formats.zero_points import ZeroPointMatrix
from .layouts.encoding import Sizes, TensorSpec
from .layouts.encodings import METHODS
from .layouts.layer import aligned
from .layouts.native_layer import NativeLayout, find_native_layouts, why_no_layout
from .layouts.quantization_options import quantization_options
from .safetensors.checkpoint import SafetensorsCheckpoint

__all__ = ["load_native", "native_group_size", "native_method"]

AnyArray = NDArray[Any]

_EVERY_ROW = slice(None)


def native_method(checkpoint: SafetensorsCheckpoint | str | os.PathLike[str], layer_idx: int) -> str | None:
    """Tell the quantized format of a layer's experts by the names, dtypes and shapes of their tensors.

    Parameters
    ----------
    checkpoint : SafetensorsCheckpoint, str or path-like
        Give a `SafetensorsCheckpoint` when asking about more than one layer.
    layer_idx : int
        The layer's number in the model.

    Returns
    -------
    str or None
        The method that `load_native` finds; None where there is nothing for it.

    Raises
    ------
    FileNotFoundError
        No checkpoint there, or a shard is missing.
    ValueError
        A file that is not what it should be.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from ktmoe_np.io.safetensors.writer import write_safetensors
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
    >>> stem = "model.layers.0.mlp.experts.0.down_proj"
    >>> codes, scale = np.zeros((128, 64), np.uint8), np.zeros((128, 4), np.uint8)
    >>> write_safetensors(path, {f"{stem}.weight_packed": codes, f"{stem}.weight_scale": scale})
    >>> native_method(path, 0), native_method(path, 1)
    ('MXFP4', None)
    """
    layouts = find_native_layouts(SafetensorsCheckpoint.opened(checkpoint), layer_idx)
    return layouts[0][1].method if layouts else None


def native_group_size(
    checkpoint: SafetensorsCheckpoint | str | os.PathLike[str], layer_idx: int
) -> int | None:
    """Tell how many columns share a scale in what `native_method` finds; None where there is nothing.

    See `native_method` for parameters and errors.
    """
    layouts = find_native_layouts(SafetensorsCheckpoint.opened(checkpoint), layer_idx)
    return layouts[0][1].group_size if layouts else None


def load_native(
    checkpoint: SafetensorsCheckpoint | str | os.PathLike[str],
    layer_idx: int,
    config: MoEConfig,
    method: str | None = None,
    experts: IntegersLike | None = None,
) -> ExpertWeights:
    """Find the experts of a layer in the quantized format of their checkpoint.

    Codes are never copied. Scales are views too, but for those that their file misaligns or interleaves,
    those of FP8 that are not float32 and those of GPTQ that are not float16.

    Parameters
    ----------
    checkpoint : SafetensorsCheckpoint, str or path-like
        Give a `SafetensorsCheckpoint` when loading more than one layer: it keeps its index and headers.
    layer_idx : int
        The layer's number in the model.
    config : MoEConfig
        What the whole layer must be.
    method : str, optional
        The format that it must have; otherwise that of the tensors.
    experts : array of int, optional
        The experts to load, in this order; None loads all. The format is found by the layer's first experts;
        of others only the names are looked at.

    Returns
    -------
    ExpertWeights
        Codes E of uint8 [N, row_bytes], or of int32 [K / 8, N] of GPTQ; scales of two dimensions.

    Raises
    ------
    FileNotFoundError
        No checkpoint there, or a shard is missing.
    ValueError
        The layer has no experts in such a format, or in another one than `method`; a tensor is missing or of
        another dtype or shape (names the file and the tensor), or of GPTQ its zeros, order or scales are what
        `GPTQ_INT4` does not take; or the experts are not those that `config` describes. Or `experts` that
        repeat or are none.
    TypeError, IndexError
        `experts` that are not integers, or not of the layer.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from ktmoe_np.io.safetensors.writer import write_safetensors
    >>> tensors = {}
    >>> for name, shape in {"gate_proj": (160, 64), "up_proj": (160, 64), "down_proj": (64, 160)}.items():
    ...     stem = f"model.layers.0.mlp.experts.0.{name}"
    ...     tensors[f"{stem}.weight_packed"] = np.zeros((shape[0], shape[1] // 2), np.uint8)
    ...     tensors[f"{stem}.weight_scale"] = np.zeros((shape[0], shape[1] // 32), np.uint8)
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
    >>> write_safetensors(path, tensors)
    >>> experts = load_native(path, 0, MoEConfig(1, 1, hidden_size=64, moe_intermediate_size=160))
    >>> experts.method, experts.projections["down_proj"].codes[0].shape
    ('MXFP4', (64, 80))
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of the native formats: {', '.join(METHODS)}")
    checkpoint = SafetensorsCheckpoint.opened(checkpoint)
    layouts = find_native_layouts(checkpoint, layer_idx)
    if not layouts:
        raise ValueError(why_no_layout(checkpoint, layer_idx))
    fewest, layout = layouts[0]
    if method not in (None, layout.method):
        # Where what is missing leaves it open, the caller's word decides.
        like = [other for count, other in layouts if count == fewest and other.method == method]
        if not like:
            raise ValueError(
                f"{checkpoint.path}: the experts of layer {layer_idx}: got {layout.method}, expected {method}"
            )
        layout = like[0]
    if experts is not None:
        layout = replace(layout, experts=chosen_experts(experts, config.num_experts))
    names = layout.check(config)
    projections = _projections(layout, config, _biases(layout, config))
    return ExpertWeights.of(projections, names=names, method=layout.method, group_size=layout.group_size)


def _cuts(layout: NativeLayout, role: str) -> dict[str, slice]:
    """The projections in a tensor, and their rows: fused gate and up alternate."""
    if role == "gate_up":
        return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    return {f"{role}_proj": _EVERY_ROW}


def _projections(
    layout: NativeLayout, config: MoEConfig, biases: Mapping[str, NDArray[np.float32]]
) -> dict[str, Projection]:
    if layout.encoding.unpack is not None:
        return _unpacked(layout, config, biases)
    projections = {}
    kind = "channel_scale" if _has_channel_scale(layout) else "block_scales"
    for role, num_rows in layout.rows(config).items():
        stored = _experts(layout, role, layout.encoding.scale, config)
        _check_contents(layout, role, config, stored)
        codes = [
            _codes(layout, array, num_rows) for array in _experts(layout, role, layout.encoding.codes, config)
        ]
        scales = [_scale(layout, array, num_rows) for array in stored]
        factors = _global_scale(layout, role, config)
        for name, cut in _cuts(layout, role).items():
            # Interleaved scales, small beside the codes, are copied: a matrix of scales has no row stride.
            given: dict[str, Any] = {kind: [np.ascontiguousarray(array[cut]) for array in scales]}
            projections[name] = Projection(
                [array[cut] for array in codes], global_scale=factors, bias=biases.get(name), **given
            )
    return projections


def _unpacked(
    layout: NativeLayout, config: MoEConfig, biases: Mapping[str, NDArray[np.float32]]
) -> dict[str, Projection]:
    """Those of encodings that are taken apart, expert by expert."""
    encoding, projections = layout.encoding, {}
    assert encoding.unpack is not None
    unpack = partial(_unpack, encoding.unpack, quantization_options(layout.layer.checkpoint.path).version)
    for role in layout.rows(config):
        scales = _experts(layout, role, encoding.scale, config)
        _check_contents(layout, role, config, scales)
        zeros: list[AnyArray | None] = [None] * len(scales)
        if encoding.zeros in layout.tensor_specs(role):
            assert encoding.zeros is not None
            zeros = list(_experts(layout, role, encoding.zeros, config))
        matrices = convert_each(unpack, _experts(layout, role, encoding.codes, config), scales, zeros)
        codes, block_scales, zero_points = (list(part) for part in zip(*matrices, strict=True))
        name = f"{role}_proj"
        projections[name] = Projection(codes, block_scales, zero_points=zero_points, bias=biases.get(name))
    return projections


def _unpack(
    unpack: Callable[..., ZeroPointMatrix],
    version: int,
    codes: AnyArray,
    scale: AnyArray,
    zeros: AnyArray | None,
) -> ZeroPointMatrix:
    return unpack(aligned(codes), aligned(scale), None if zeros is None else aligned(zeros), version)


def _experts(layout: NativeLayout, role: str, spec: TensorSpec, config: MoEConfig) -> list[AnyArray]:
    """View the tensors of one kind of a projection, one array for each expert that is read."""
    arrays = [layout.layer.checkpoint.tensor(name) for name in layout.names_of(role, spec, config)]
    return arrays if layout.pattern.per_expert else [arrays[0][e, ...] for e in layout.chosen(config)]


def _codes(layout: NativeLayout, array: AnyArray, num_rows: int) -> AnyArray:
    """The codes of a matrix: rows of bytes, or numbers whose rows are not the matrix's."""
    return array if layout.encoding.transposed else array.view(np.uint8).reshape(num_rows, -1)


def _has_channel_scale(layout: NativeLayout) -> bool:
    """Whether a scale serves a row, and not blocks of a matrix."""
    return NATIVE_FORMATS[layout.method.lower()].info.group is None


def _scale(layout: NativeLayout, array: AnyArray, num_rows: int) -> AnyArray:
    """The scales of a matrix, in two dimensions."""
    dtype = layout.encoding.scale_dtype
    if dtype == np.uint8:
        return array.view(np.uint8)
    scale = aligned(array).astype(dtype, copy=False)
    if _has_channel_scale(layout):
        return np.broadcast_to(scale.reshape(-1, 1), (num_rows, 1))
    return scale


def _check_contents(layout: NativeLayout, role: str, config: MoEConfig, scales: list[AnyArray]) -> None:
    """Raise ValueError when a tensor whose contents matter has others."""
    num_columns = config.moe_intermediate_size if role == "down" else config.hidden_size
    num_rows = layout.rows(config)[role]
    for spec in layout.tensor_specs(role):
        if spec.problem is None:
            continue
        arrays = _experts(layout, role, spec, config)
        for e, array, scale in zip(layout.chosen(config), arrays, scales, strict=True):
            problem = spec.problem(array, Sizes(num_rows, num_columns, scale.shape))
            if problem is not None:
                name = layout.name(role, spec, e)
                file = layout.layer.checkpoint.file_of(name)
                raise ValueError(f"{file}: tensor {name!r}: {problem}")


def _global_scale(layout: NativeLayout, role: str, config: MoEConfig) -> NDArray[np.float32] | None:
    """The factors of the experts' matrices, read."""
    spec = layout.encoding.global_scale
    if spec is None:
        return None
    factors = np.array([array.item() for array in _experts(layout, role, spec, config)], np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        scale = np.float32(1) / factors if layout.encoding.reciprocal else factors
    wrong = ~(np.isfinite(factors) & np.isfinite(scale))
    if wrong.any():
        at = int(np.argmax(wrong))
        e = layout.chosen(config)[at]
        name = layout.name(role, spec, e)
        file = layout.layer.checkpoint.file_of(name)
        expected = "a finite number" + (" with a finite reciprocal" if layout.encoding.reciprocal else "")
        raise ValueError(f"{file}: tensor {name!r}: got {factors[at]} for expert {e}, expected {expected}")
    return scale


def _biases(layout: NativeLayout, config: MoEConfig) -> dict[str, NDArray[np.float32]]:
    biases: dict[str, NDArray[np.float32]] = {}
    if layout.layer.has_biases(layout.pattern):
        for role, template in layout.pattern.biases.items():
            vectors = layout.layer.tensors(layout.pattern, template, config.num_experts, layout.experts)
            stacked = np.stack([vector.astype(np.float32) for vector in vectors])  # dtypes may differ
            for name, cut in _cuts(layout, role).items():
                biases[name] = np.ascontiguousarray(stacked[:, cut])
    return biases
