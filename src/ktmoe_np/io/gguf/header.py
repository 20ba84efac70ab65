"""The header of a GGUF file, and the checks of its contents.

The header is parsed here, not by the `gguf` package: that one believes every length (an array said to have
2**60 elements is a loop of as many steps) and makes a Python object of every string of a vocabulary. Here a
value is skipped, and decoded at first use; a length is accepted if the file has the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

from ...formats.gguf import GGUF_NUMBERS, GgufFormat
from .values import U32, UINT32, GgufCursor, GgufValue, decode_element, decode_value, skip_value

__all__ = ["GGUF_TYPES", "GgufHeader", "GgufTensorInfo", "parse_gguf_header"]

#: Tensor types that the engine may not compute from; they are sized nevertheless.
_OTHERS = {
    number: GgufFormat(name, block, block_bytes)
    for number, name, block, block_bytes in (
        (9, "q8_1", 32, 40),
        (15, "q8_k", 256, 292),
        (24, "i8", 1, 1),
        (25, "i16", 1, 2),
        (26, "i32", 1, 4),
        (27, "i64", 1, 8),
        (28, "f64", 1, 8),
    )
}

#: The tensor types by their numbers in a file.
GGUF_TYPES: Mapping[int, GgufFormat] = dict(sorted({**_OTHERS, **GGUF_NUMBERS}.items()))

_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)

_START = Struct("<4sIQQ")  # magic, version, tensors, keys

#: What an entry of a tensor has behind its name and the number of its dimensions, by that number.
_ENTRIES = tuple(Struct(f"<{n}QIQ") for n in range(_MAX_DIMENSIONS + 1))

#: The least bytes of an entry: a key with its length, type and value; a tensor without dimensions.
_LEAST_KEY, _LEAST_TENSOR = 13, 24

#: The most entries that are read, ten times what the largest models have; each takes microseconds.
_MAX_KEYS, _MAX_TENSORS = 2**16, 2**20

#: The format's own limit on keys; names of tensors are shorter.
_MAX_NAME_BYTES = 2**16 - 1


class GgufTensorInfo(NamedTuple):
    """A tensor: its type, its shape as NumPy has it, and which bytes of the file it is."""

    type: str  #: in small letters; "type 99" for one that is not known
    shape: tuple[int, ...]
    row_bytes: int  #: of the last dimension; 0 for a type that is not known
    begin: int
    num_bytes: int  #: 0 for a type that is not known


class _Entry(NamedTuple):
    """A tensor as the header has it."""

    shape: tuple[int, ...]
    type: int
    offset: int


class GgufHeader:
    """A parsed header; values of the metadata are decoded at first use."""

    def __init__(
        self, cursor: GgufCursor, values: Mapping[str, GgufValue], tensors: Mapping[str, GgufTensorInfo]
    ) -> None:
        self._cursor = cursor
        self.values = values
        self.tensors = tensors

    def value(self, key: str) -> Any:
        """Decode a value; None when there is none."""
        value = self.values.get(key)
        return None if value is None else decode_value(self._cursor, value, f"metadata {key!r}")

    def length(self, key: str) -> int | None:
        """Number of elements of an array; None when there is no such key, or its value is no array."""
        value = self.values.get(key)
        return None if value is None else value.length

    def element(self, key: str, index: int) -> Any:
        """Decode one element, of those that `length` counts, without the others where they are numbers."""
        return decode_element(self._cursor, self.values[key], index, f"metadata {key!r}")


def parse_gguf_header(path: Path, data: memoryview) -> GgufHeader:
    """Parse and check a header.

    Parameters
    ----------
    path : Path
        For messages.
    data : memoryview
        The file.

    Returns
    -------
    GgufHeader
        Tensors in the order of the header, each of them inside the file.

    Raises
    ------
    ValueError
        Names the file and, where it is about one, the tensor.
    """
    cursor = GgufCursor(path, data)
    num_tensors, num_keys = _parse_start(cursor)
    cursor.need(
        num_keys * _LEAST_KEY + num_tensors * _LEAST_TENSOR, f"{num_keys} keys and {num_tensors} tensors"
    )
    for got, most, what in ((num_keys, _MAX_KEYS, "keys"), (num_tensors, _MAX_TENSORS, "tensors")):
        if got > most:
            raise ValueError(f"{path}: the header: got {got} {what}, expected at most {most}")
    values: dict[str, GgufValue] = {}
    for number in range(num_keys):
        key = cursor.string(f"key {number} of the metadata", _MAX_NAME_BYTES)
        if key in values:
            raise ValueError(f"{path}: key {key!r} occurs twice")
        values[key] = skip_value(cursor, f"metadata {key!r}")
    alignment = _alignment(cursor, values.get("general.alignment"))
    entries: dict[str, _Entry] = {}
    for number in range(num_tensors):
        name = cursor.string(f"the name of tensor {number}", _MAX_NAME_BYTES)
        if name in entries:
            raise ValueError(f"{path}: tensor {name!r} occurs twice")
        entries[name] = _parse_entry(cursor, f"tensor {name!r}")
    start = -(-cursor.place // alignment) * alignment
    tensors = {}
    for name, entry in entries.items():
        if entry.offset % alignment:
            raise ValueError(
                f"{path}: tensor {name!r}: got offset {entry.offset}, expected a multiple of {alignment}"
            )
        tensors[name] = _place(path, name, entry, start, len(data))
    _check_disjoint(path, tensors)
    return GgufHeader(cursor, values, tensors)


def _parse_start(cursor: GgufCursor) -> tuple[int, int]:
    """Count the tensors and the keys."""
    size = len(cursor.data)
    if size < _START.size:
        raise ValueError(f"{cursor.path}: {size} bytes are too short for a GGUF file")
    magic, version, num_tensors, num_keys = _START.unpack(cursor.take(_START.size, "the start"))
    if magic != _MAGIC:
        raise ValueError(
            f"{cursor.path}: the magic number: got {magic!r}, expected {_MAGIC!r}: not a GGUF file"
        )
    if version and version % 2**16 == 0:
        raise ValueError(f"{cursor.path}: a big-endian GGUF file; only little-endian ones are read")
    if version not in _VERSIONS:
        expected = " or ".join(map(str, _VERSIONS))
        raise ValueError(f"{cursor.path}: the version of GGUF: got {version}, expected {expected}")
    return num_tensors, num_keys


def _alignment(cursor: GgufCursor, value: GgufValue | None) -> int:
    """The alignment of the offsets of tensors."""
    if value is None:
        return _DEFAULT_ALIGNMENT
    if value.type != UINT32 or value.length is not None:
        got = f"type {value.type}" if value.length is None else "an array"
        raise ValueError(f"{cursor.path}: metadata 'general.alignment': got {got}, expected a uint32")
    (alignment,) = U32.unpack_from(cursor.data, value.begin)
    if alignment == 0 or alignment & (alignment - 1):
        raise ValueError(
            f"{cursor.path}: metadata 'general.alignment': got {alignment}, expected a power of two"
        )
    return int(alignment)


def _parse_entry(cursor: GgufCursor, what: str) -> _Entry:
    num_dimensions = cursor.integer(U32, what)
    if num_dimensions > _MAX_DIMENSIONS:
        raise ValueError(
            f"{cursor.path}: {what}: got {num_dimensions} dimensions, expected at most {_MAX_DIMENSIONS}"
        )
    form = _ENTRIES[num_dimensions]
    *shape, kind, offset = form.unpack(cursor.take(form.size, what))
    return _Entry(tuple(shape[::-1]), kind, offset)  # a file names the contiguous dimension first


def _place(path: Path, name: str, entry: _Entry, start: int, size: int) -> GgufTensorInfo:
    """Make sure of a tensor's entry; data begin at `start` of a file of `size` bytes."""
    if not all(entry.shape):
        raise ValueError(
            f"{path}: tensor {name!r}: got shape {list(entry.shape)}, expected no dimension of 0"
        )
    kind = GGUF_TYPES.get(entry.type)
    num_columns = entry.shape[-1] if entry.shape else 1
    if kind is None:
        # Files of a newer ggml stay readable, but for this tensor.
        row_bytes = num_bytes = 0
    else:
        if num_columns % kind.block:
            raise ValueError(
                f"{path}: tensor {name!r}: got {kind.name} with rows of {num_columns}, "
                f"expected a multiple of {kind.block}"
            )
        row_bytes = kind.row_bytes(num_columns)
        num_bytes = math.prod(entry.shape[:-1]) * row_bytes
    begin = start + entry.offset
    end = begin + num_bytes
    if begin >= size or end > size:
        raise ValueError(
            f"{path}: tensor {name!r}: got bytes {begin} to {end}, expected them in the {size} of the file: "
            "it is cut off, or its header lies"
        )
    type_name = f"type {entry.type}" if kind is None else kind.name
    return GgufTensorInfo(type_name, entry.shape, row_bytes, begin, num_bytes)


def _check_disjoint(path: Path, tensors: Mapping[str, GgufTensorInfo]) -> None:
    """Raise ValueError when two tensors share bytes."""
    spans = sorted((info.begin, info.begin + info.num_bytes, name) for name, info in tensors.items())
    for (_, end, name), (begin, _, following) in pairwise(spans):
        if begin < end:
            raise ValueError(f"{path}: tensors {name!r} and {following!r} overlap")
