"""Reading numbers, strings and arrays of a GGUF header, each only when the file has the bytes for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

__all__ = ["U32", "UINT32", "GgufCursor", "GgufValue", "decode_element", "decode_value", "skip_value"]

#: Where a header must end. Real ones have at most some 20 MB, the vocabulary; the format has no limit.
MAX_HEADER_BYTES = 2**27

U32 = Struct("<I")
U64 = Struct("<Q")

#: Types of values by their numbers.
_NUMBERS: Mapping[int, np.dtype[Any]] = {
    **{
        number: np.dtype(code)
        for number, code in enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))
    },
    **{10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8")},
}
UINT32 = 4
_STRING, _ARRAY = 8, 9


class GgufValue(NamedTuple):
    """The position of a value of the metadata."""

    type: int
    begin: int
    length: int | None  # None: not an array


class GgufCursor:
    """A place in a header; every step is checked against what there is."""

    def __init__(self, path: Path, data: memoryview, place: int = 0) -> None:
        self.path = path
        self.data = data[:MAX_HEADER_BYTES]
        self.place = place

    def need(self, count: int, what: str) -> None:
        """Raise ValueError when fewer bytes are left."""
        left = len(self.data) - self.place
        if count > left:
            raise ValueError(
                f"{self.path}: {what} needs {count} bytes, but the header has {left} left: the file is cut "
                "off, or its header lies"
            )

    def skip(self, count: int, what: str) -> None:
        """Step over bytes."""
        self.need(count, what)
        self.place += count

    def take(self, count: int, what: str) -> memoryview:
        """View bytes, and step over them."""
        self.skip(count, what)
        return self.data[self.place - count : self.place]

    def integer(self, form: Struct, what: str) -> int:
        """Read a number."""
        return int(form.unpack(self.take(form.size, what))[0])

    def string(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        """Read a string of at most so many bytes."""
        length = self.integer(U64, what)
        if length > most:
            raise ValueError(f"{self.path}: {what}: got {length} bytes, expected at most {most}")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {what} is not UTF-8: {error}") from None

    def skip_strings(self, count: int, what: str) -> None:
        """Step over strings: the loop that a vocabulary makes long, so it calls nothing but `unpack`."""
        self.need(count * 8, what)  # also the limit of the loop
        data, place, last, unpack = self.data, self.place, len(self.data) - 8, U64.unpack_from
        for _ in range(count):
            if place > last:
                break
            place += 8 + unpack(data, place)[0]
        self.skip(place - self.place, what)


def skip_value(cursor: GgufCursor, what: str) -> GgufValue:
    """Step over a value of the metadata."""
    kind, length = cursor.integer(U32, what), None
    if kind == _ARRAY:
        kind, length = cursor.integer(U32, what), cursor.integer(U64, what)
    value = GgufValue(kind, cursor.place, length)
    if kind == _STRING:
        cursor.skip_strings(1 if length is None else length, what)
    elif kind in _NUMBERS:
        cursor.skip(_NUMBERS[kind].itemsize * (1 if length is None else length), what)
    else:
        got = "a value" if length is None else "elements"
        raise ValueError(f"{cursor.path}: {what}: got {got} of type {kind}, expected numbers or strings")
    return value


def decode_value(cursor: GgufCursor, value: GgufValue, what: str) -> Any:
    """Decode a value: an int, float, bool or str, or a list of such."""
    cursor = GgufCursor(cursor.path, cursor.data, value.begin)
    count = 1 if value.length is None else value.length
    if value.type == _STRING:
        decoded: list[Any] = [cursor.string(what) for _ in range(count)]
    else:
        dtype = _NUMBERS[value.type]
        text = cursor.take(count * dtype.itemsize, what)
        decoded = np.frombuffer(text, dtype).tolist()
    return decoded[0] if value.length is None else decoded


def decode_element(cursor: GgufCursor, value: GgufValue, index: int, what: str) -> Any:
    """Decode one element of an array, as `decode_value` does."""
    if value.type == _STRING:
        return decode_value(cursor, value, what)[index]
    dtype = _NUMBERS[value.type]
    return np.frombuffer(cursor.data, dtype, 1, value.begin + index * dtype.itemsize).tolist()[0]
