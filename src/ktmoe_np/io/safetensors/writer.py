"""Writing safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..mapped import MappedFiles
from ..replace import remove_leftovers, replace_text, replacing
from .header import DTYPES

__all__ = ["remove_leftovers", "replace_text", "replacing", "write_safetensors"]

#: Where the data begins in the file, and with it every tensor whose size is a multiple: a cache line.
_ALIGNMENT = 64

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a safetensors file.

    The data begins at a multiple of 64 bytes. The format allows no gaps, so tensors are laid out by the power
    of two in their sizes, largest first: those of a multiple of 64 bytes are then aligned to 64, and
    the others at least to their dtype.

    Parameters
    ----------
    path : str or path-like
        Replaced when it is there, all at once: see `replacing`.
    tensors : mapping of str to ndarray
        In any memory order; written in C order.
    metadata : mapping of str to str, optional

    Raises
    ------
    TypeError
        A dtype that the format does not have.
    OSError
        The file cannot be written, or a file of a tensor was truncated: names the file.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from ktmoe_np.io import SafetensorsFile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "x.safetensors")
    >>> write_safetensors(path, {"a": np.array([1, 2], np.int16)})
    >>> SafetensorsFile(path).tensor("a")
    array([1, 2], dtype=int16)
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    names = sorted(tensors, key=lambda name: -_power_of_two(tensors[name].nbytes))
    begin = 0
    for name in names:
        array = tensors[name]
        if array.dtype not in _NAMES:
            raise TypeError(f"tensor {name!r}: got {array.dtype}, expected one of {', '.join(DTYPES)}")
        end = begin + array.nbytes
        shape = list(array.shape)
        header[name] = {"dtype": _NAMES[array.dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            MappedFiles([tensors[name]]).check()
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def _power_of_two(num_bytes: int) -> int:
    """Largest power of two, up to the alignment, that divides the size."""
    return (num_bytes | _ALIGNMENT) & -(num_bytes | _ALIGNMENT)
