"""Writing safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ._safetensors_header import DTYPES

__all__ = ["remove_leftovers", "replace_text", "replacing", "write_safetensors"]

#: Where the data begins in the file, and with it every tensor whose size is a multiple: a cache line.
_ALIGNMENT = 64

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: How files end that are not complete yet; before it stands the writing process.
_PART = "part"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file that others see complete or not at all.

    What is written goes to a hidden file beside it, which takes its place when it is whole and on the disk,
    and goes away with an exception, interrupts included. Who has mapped the old file keeps it.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "x")
    >>> with replacing(path) as file:
    ...     _ = file.write(b"whole")
    >>> path.read_bytes()
    b'whole'
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{os.getpid()}.{_PART}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text to a file, in UTF-8, as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


def remove_leftovers(directory: str | os.PathLike[str]) -> None:
    """Remove what `replacing` has left in a directory when its process was killed."""
    for part in Path(directory).glob(f".*.{_PART}"):
        pid = part.name.split(".")[-2]
        if pid.isdecimal() and not _is_running(int(pid)):
            part.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


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
        The file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from ktmoe_np.io import SafetensorsFile
    >>> path = Path(tempfile.mkdtemp(), "x.safetensors")
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
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def _power_of_two(num_bytes: int) -> int:
    """Largest power of two, up to the alignment, that divides the size."""
    return (num_bytes | _ALIGNMENT) & -(num_bytes | _ALIGNMENT)
