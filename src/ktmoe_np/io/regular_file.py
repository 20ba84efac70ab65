"""Opening the files of a checkpoint: regular files only, so that no reader waits for a pipe or a device."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader

__all__ = ["open_regular", "read_regular"]

#: O_NONBLOCK: opening a FIFO without a writer returns at once instead of waiting for one.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading.

    Parameters
    ----------
    path : str or path-like
        Symbolic links are followed.

    Returns
    -------
    binary file

    Raises
    ------
    FileNotFoundError
        No such file.
    OSError
        It cannot be opened for another reason.
    ValueError
        A directory, a FIFO, a device or a socket, or a name that no file can have: names the path.
    """
    try:
        # The file has its descriptor from the beginning: an interrupt closes it once, whenever it comes.
        file = open(path, "rb", opener=_open)  # noqa: SIM115  # the caller's
    except ValueError as error:  # a NUL, or a character that the file system's encoding lacks
        raise ValueError(f"{os.fspath(path)!r}: not a file name: {error}") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: got a directory, expected a regular file") from None
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise ValueError(f"{path}: got a socket or a missing device, expected a regular file") from None
    kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
    if kind != stat.S_IFREG:
        file.close()
        raise ValueError(f"{path}: got {_KINDS.get(kind, 'a special file')}, expected a regular file")
    return file


def _open(path: str, _: int) -> int:
    return os.open(path, _FLAGS)


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """Read all of a regular file; ValueError, before anything is read, if it has more than `most` bytes.

    Other errors are those of `open_regular`.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "x")
    >>> _ = path.write_bytes(b"1234")
    >>> read_regular(path, 4)
    b'1234'
    >>> read_regular(path, 3)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: .../x: got 4 bytes, expected at most 3
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        text = file.read(most + 1) if size <= most else b""
    if len(text) > most or size > most:
        raise ValueError(f"{path}: got {max(size, len(text))} bytes, expected at most {most}")
    return text
