"""Files mapped read-only, and what happens when they are truncated while in use.

Reading a page beyond the end of a truncated file raises SIGBUS, which only a process-wide signal handler
could turn into an exception. So the size of a mapped file is checked, through the descriptor that the mapping
keeps, before it is read: when a tensor is looked up, when weights are loaded, and when a pass begins.
Truncating a file between that check and the last read of the pass still ends the process. To replace a file
that may be in use, rename another file over it: existing mappings keep the old one.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

__all__ = ["FileIdentity", "FileMap", "MappedFiles", "identity_at", "map_file"]


class FileIdentity(NamedTuple):
    """Distinguishes a file from another one under its name, and from itself after a write."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """From the status of a file."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def is_same_file(self, then: FileIdentity) -> bool:
        """Whether this is the file of `then`, of the same size, at any modification time."""
        return self == then._replace(mtime_ns=self.mtime_ns)


def identity_at(path: Path) -> FileIdentity | None:
    """The identity of the file of that name; None when there is none, or it cannot be read."""
    try:
        return FileIdentity.of(path.stat())
    except (OSError, ValueError):  # opening it raises the reason
        return None


class FileMap(mmap.mmap):
    """A mapping that knows its file. It keeps a descriptor of its own; `map_file` makes one."""

    path: Path
    identity: FileIdentity  #: of the file when it was mapped

    def check(self) -> None:
        """Raise OSError when the file is shorter than what is mapped of it."""
        size = self.size()
        if size < len(self):
            raise _cut_off(self.path, size, len(self))


def map_file(file: BinaryIO, path: Path) -> FileMap:
    """Map an open file, which must not be empty; `path` is what messages call it."""
    mapping = FileMap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapping.path, mapping.identity = path, FileIdentity.of(os.fstat(file.fileno()))
    return mapping


class _Watched(NamedTuple):
    """A mapping, of any origin."""

    size_now: Callable[[], int]
    expected: int  #: the least that the file must have
    name: object


class MappedFiles:
    """The mapped files of arrays, including those mapped by `numpy.memmap` and `mmap`.

    Parameters
    ----------
    arrays : iterable
        Arrays, and lists or tuples of them. Other objects, and arrays without a file, are ignored.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "x")
    >>> _ = path.write_bytes(bytes(8192))
    >>> files = MappedFiles([np.ones(3), [np.memmap(path, np.int16, "r")[5:]]])
    >>> files.check()
    >>> os.truncate(path, 4096)
    >>> files.check()
    Traceback (most recent call last):
    OSError: ...: got 4096 bytes, expected the 8192 that are in use: the file was cut off
    """

    __slots__ = ("_watched",)

    def __init__(self, arrays: Iterable[Any] = ()) -> None:
        found: dict[int, _Watched] = {}
        for array in _flat(arrays):
            mapping, memmap = _mapping_of(array)
            if mapping is not None and id(mapping) not in found:
                watched = _watched(mapping, memmap)
                if watched is not None:
                    found[id(mapping)] = watched
        self._watched = tuple(found.values())

    def check(self) -> None:
        """Raise OSError when one of the files is shorter than it was: names it. A system call per file."""
        for size_now, expected, name in self._watched:
            size = size_now()
            if size < expected:
                raise _cut_off(name, size, expected)


def _flat(arrays: Iterable[Any]) -> Iterator[Any]:
    for item in arrays:
        if isinstance(item, list | tuple):
            yield from item
        else:
            yield item


def _mapping_of(array: Any) -> tuple[mmap.mmap | None, Any]:
    """The mapping that an array's memory belongs to, and the `numpy.memmap` between them; or None."""
    memmap = None
    owner = array
    while True:
        if isinstance(owner, np.ndarray):
            memmap = owner if isinstance(owner, np.memmap) else memmap
            owner = owner.base
        elif isinstance(owner, memoryview):
            owner = owner.obj
        else:
            return owner if isinstance(owner, mmap.mmap) else None, memmap


def _watched(mapping: mmap.mmap, memmap: Any) -> _Watched | None:
    """Watch a mapping; None when it is of memory or a device, or has no descriptor."""
    if isinstance(mapping, FileMap):
        return _Watched(mapping.size, len(mapping), mapping.path)
    try:
        size = mapping.size()
    except (OSError, ValueError):
        return None
    if size == 0 and _has_first_page(mapping):
        return None  # a device, which has no size and cannot be cut off
    if memmap is None or memmap.filename is None:
        # Where the mapping begins is not known: the file has to stay as long as it is.
        return _Watched(mapping.size, max(size, len(mapping)), "a mapped file")
    begin = memmap.offset - memmap.offset % mmap.ALLOCATIONGRANULARITY
    return _Watched(mapping.size, begin + len(mapping), memmap.filename)


def _has_first_page(mapping: mmap.mmap) -> bool:
    """Whether the first page can be read: the system fails where touching it would end the process."""
    reader, writer = os.pipe()
    try:
        os.write(writer, memoryview(mapping)[:1])
    except OSError:
        return False
    finally:
        os.close(reader)
        os.close(writer)
    return True


def _cut_off(name: object, size: int, expected: int) -> OSError:
    return OSError(f"{name}: got {size} bytes, expected the {expected} that are in use: the file was cut off")
