"""The header of a safetensors file, and the checks of its contents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..json_text import MAX_JSON_BYTES, parse_json_object, shown

__all__ = ["DTYPES", "MAX_HEADER_BYTES", "TensorInfo", "parse_header"]

#: The format's dtypes that NumPy can hold. F4 and F6, which share bytes between values, are not among them.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(scalar)
    for name, scalar in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
        "C64": np.complex64,
    }.items()
}

_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}

#: The type of a dimension; a bool is no number here.
_INTEGERS = frozenset((int,))

#: The most tensors of a file, ten times what the largest models have; each takes microseconds.
_MAX_TENSORS = 2**20

#: The format's own limit on the length of a header.
MAX_HEADER_BYTES = MAX_JSON_BYTES

#: What a NumPy array may have.
_MAX_DIMENSIONS = 64
_MAX_BYTES = 2**63 - 1

#: Longest name of a tensor, in letters; error messages quote names.
_MAX_NAME = 2**16 - 1


class TensorInfo(NamedTuple):
    """One entry of a header: the dtype's name, the shape, and the bytes `[begin, end)` after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(path: Path, text: bytes, num_bytes: int) -> tuple[dict[str, TensorInfo], Mapping[str, str]]:
    """Parse and check a header.

    Parameters
    ----------
    path : Path
        For messages.
    text : bytes
        The header, without its length.
    num_bytes : int
        The bytes that follow the header in the file.

    Returns
    -------
    tensors : dict
        In the order of the header.
    metadata : mapping of str to str

    Raises
    ------
    ValueError
        Names the file and, where it is about one, the tensor.
    """
    header = parse_json_object(text, f"{path}: the header", finite=True)
    metadata = _check_metadata(path, header.pop("__metadata__", {}))
    if len(header) > _MAX_TENSORS:
        raise ValueError(f"{path}: the header: got {len(header)} tensors, expected at most {_MAX_TENSORS}")
    tensors = {name: _check_entry(path, name, entry, num_bytes) for name, entry in header.items()}
    _check_disjoint(path, tensors)
    return tensors, metadata


def _check_metadata(path: Path, metadata: object) -> Mapping[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__: got {shown(metadata)}, expected an object of strings")
    return metadata


def _check_entry(path: Path, name: str, entry: object, num_bytes: int) -> TensorInfo:
    """Make sure of a header's entry; `num_bytes` follow the header."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            pass
        case _:
            raise ValueError(
                f"{path}: tensor {name!r}: got {shown(entry)}, expected dtype, shape and two data_offsets"
            )
    if len(name) > _MAX_NAME:
        raise ValueError(
            f"{path}: tensor {name!r:.80}: got a name of {len(name)} letters, expected at most {_MAX_NAME}"
        )
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(
            f"{path}: tensor {name!r}: got {len(shape)} dimensions, expected at most {_MAX_DIMENSIONS}"
        )
    if not (_INTEGERS.issuperset(map(type, shape)) and min(shape, default=0) >= 0):
        raise ValueError(f"{path}: tensor {name!r}: got shape {shown(shape)}, expected numbers >= 0")
    if not (type(begin) is int and type(end) is int and 0 <= begin <= end):
        raise ValueError(f"{path}: tensor {name!r}: got data_offsets {shown([begin, end])}, expected a range")
    if end > num_bytes:
        raise ValueError(
            f"{path}: tensor {name!r}: got bytes {begin} to {end}, expected them in the {num_bytes} that "
            "follow the header: the file is cut off, or its header lies"
        )
    if dtype in _SIZES:
        itemsize = _SIZES[dtype]
        if math.prod(filter(None, shape)) * itemsize > _MAX_BYTES:
            raise ValueError(
                f"{path}: tensor {name!r}: got shape {shown(shape)}, expected one that an array can have"
            )
        num_bytes = math.prod(shape) * itemsize
        if num_bytes != end - begin:
            raise ValueError(
                f"{path}: tensor {name!r}: got {dtype} of shape {shape}, {num_bytes} bytes, expected "
                f"{end - begin}, what its data_offsets span"
            )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _check_disjoint(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise ValueError when two tensors share bytes."""
    spans = sorted((info.begin, info.end, name) for name, info in tensors.items() if info.begin < info.end)
    for (_, end, name), (begin, _, following) in pairwise(spans):
        if begin < end:
            raise ValueError(f"{path}: tensors {name!r} and {following!r} overlap")
